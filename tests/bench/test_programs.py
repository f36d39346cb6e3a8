"""The benchmarks of whole programs on a tiny model: what they compare, count and refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from bench import (
    bench_data_loading,
    bench_data_sources,
    bench_pictures,
    bench_scaling,
    bench_scoring,
    bench_shortcuts,
    bench_train_step,
    samples,
)
from bench.bench_train_step import GROUPED, RANDOM, RecipeStep, TrainStep
from bench.comparison import WrongResult
from bench.documents import NumberTokenizer, spread, synthetic_ethics, synthetic_truthfulqa
from bench.models import CPU_SMALL, Size, hugging_face_llama, random_decoder
from bench.train_step import HuggingFaceModel, hugging_face_model
from mmalign.config import DataConfig
from mmalign.data.archives import TarArchive
from mmalign.data.pictures import Pictures
from mmalign.data.samples import read_samples
from mmalign.evaluation.scoring import plan_scoring
from mmalign.evaluation.tasks.multiple_choice import Document

CPU = torch.device("cpu")
TINY = Size(
    "tiny",
    replace(
        CPU_SMALL.decoder,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    ),
    replace(
        CPU_SMALL.vision,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=56,
    ),
)


# ---- samples ----


@pytest.mark.parametrize(
    ("stage", "mean_length", "padding_of_16"), [("pretrain", 300, 0.09), ("finetune", 550, 0.45)]
)
def test_lengths_are_llavas(stage, mean_length, padding_of_16):
    lengths = (samples.STAGES[stage].draw(1 << 14, seed=5) + 256).tolist()
    assert np.mean(lengths) == pytest.approx(mean_length, rel=0.02)
    padding = samples.padding_share(lengths, samples.random_batches(lengths, 16))
    assert padding == pytest.approx(padding_of_16, abs=0.02)


def test_padding_share_counted_by_hand():
    # rows of 5 + 5 and 4 + 4 places for 3 + 5 + 2 + 4 tokens
    assert samples.padding_share([3, 5, 2, 4], [[0, 1], [2, 3]]) == pytest.approx(4 / 18)


def test_grouped_batches_hold_every_sample_once():
    lengths = samples.STAGES["finetune"].draw(400, seed=1).tolist()
    batches = samples.grouped_batches(lengths, 4)
    assert sorted(i for batch in batches for i in batch) == list(range(400))
    random = samples.padding_share(lengths, samples.random_batches(lengths, 4))
    assert samples.padding_share(lengths, batches) < random / 2


@pytest.mark.parametrize("grouped", [False, True])
def test_a_typical_step_has_the_mean_length_and_padding_of_all(grouped):
    step = samples.typical_step("finetune", 8, 4, 256, grouped)
    assert [len(batch) for batch in step] == [4, 4]
    lengths = [text + 256 for batch in step for text in batch]
    assert np.mean(lengths) == pytest.approx(550, rel=0.02)
    padding = samples.padding_share(lengths, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert padding < 0.05 if grouped else padding == pytest.approx(0.27, abs=0.02)


def test_a_sample_has_the_tokens_that_were_asked_for():
    drawn = samples.samples_of("pretrain", [10, 40], TINY)
    assert drawn.lengths == [26, 56]
    for sample, text, pixels in zip(drawn.encoded, (10, 40), drawn.pixels, strict=True):
        assert (sample.input_ids == TINY.image_token_id).sum() == 16
        assert (sample.labels >= 0).sum() == text // 2
        assert pixels.shape == (1, 3, 56, 56) and pixels.dtype == torch.uint8


# ---- a training step ----


def comparison(stage: str) -> TrainStep:
    return TrainStep(TINY, stage, 4, 2, 700, "fp32", [RANDOM, GROUPED])


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_side_of_a_training_step_learns(stage):
    compared = comparison(stage)
    made = compared.calls(compared.variants)
    for name, call in made.calls.items():
        made.prepare[name]()
        call(None)
        figures = compared.figures(name, 2.0)
        assert figures["samples_per_second"] == 2.0 and figures["flops"] > 0
        assert (figures["padding"] == 0) == (name == "mmalign")
    assert compared.variants[1:] == [
        "transformers, padded",
        "transformers, padded, grouped by length",
    ]


def test_another_model_is_not_timed(monkeypatch):
    def slightly_other(model, checkpointing, liger) -> HuggingFaceModel:
        theirs = hugging_face_model(model, checkpointing, liger)
        head = theirs.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach() * 1.01)
        return theirs

    monkeypatch.setattr(bench_train_step, "hugging_face_model", slightly_other)
    compared = comparison("pretrain")
    with pytest.raises(WrongResult, match="loss"):
        compared.calls(compared.variants)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_recomputation_changes_no_loss():
    """Checked as every peer is: calls() compares the losses."""
    checkpointing = replace(RANDOM, checkpointing=True)
    compared = TrainStep(TINY, "finetune", 2, 2, 700, "fp32", [checkpointing])
    made = compared.calls(compared.variants)
    made.prepare[checkpointing.name]()
    made.calls[checkpointing.name](None)


def test_a_recipes_step_is_its_batch_and_changes_the_weights():
    compared = RecipeStep(TINY, "tiny-finetune", [900, 2048], num_samples=3)
    made = compared.calls(compared.variants)
    for name, tokens in zip(compared.variants, (900, 2048), strict=True):
        made.prepare[name]()
        step = made.calls[name].__defaults__[0]
        batches = step.step.batches
        assert sum(len(batch.cu_seqlens) - 1 for batch in batches) == 3
        assert max(len(batch.input_ids) for batch in batches) <= tokens
        before = {n: p.detach().clone() for n, p in step.model.trainable_parameters().items()}
        made.calls[name](None)
        assert all(not p.equal(before[n]) for n, p in step.model.trainable_parameters().items())
        figures = compared.figures(name, 2.0)
        assert figures["tokens_per_second"] == sum(len(b.input_ids) for b in batches) / 2
        assert figures["recompute"].startswith("--recompute none")


# ---- scoring ----


def test_both_sides_score_the_same():
    compared = bench_scoring.Scoring(TINY, "ethics_virtue", 5, "fp32", 512)
    made = compared.calls(compared.variants)
    for call in made.calls.values():
        call()
    assert 0 < compared.tokens["mmalign"] < compared.tokens["lm-evaluation-harness"]
    right = {name: [-1.0] * len(compared.requests) for name in compared.variants}
    compared.compare(right)
    with pytest.raises(WrongResult, match="harness"):
        compared.compare(right | {"mmalign": [-1.002] * len(compared.requests)})


@pytest.mark.parametrize("num_new_tokens", [3, 1])
def test_both_sides_answer_the_same_about_pictures(num_new_tokens):
    compared = bench_pictures.Pictures(TINY, 3, 4, num_new_tokens, "fp32")
    made = compared.calls(compared.variants)  # compares the log-odds
    odds = made.calls["mmalign"]()
    assert len(odds) == 12 and odds.std() > 0
    assert compared.figures("transformers", 2.0)["samples_per_second"] == 6
    with pytest.raises(WrongResult, match="log-odds differ"):
        compared.compare(odds, odds + 0.01)


def test_a_hugging_face_llama_has_the_same_weights():
    decoder = random_decoder(TINY.decoder, CPU, torch.float32)
    theirs = hugging_face_llama(decoder)
    ids, length = torch.arange(10, 30), 20
    offsets = torch.tensor([0, length], dtype=torch.int32)
    position_ids = torch.arange(length, dtype=torch.int32)
    hidden = decoder(ids, decoder.packed_positions(position_ids, offsets, length))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        torch.testing.assert_close(decoder.lm_head(hidden), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_shortcuts_compute_the_same_with_less(stage, monkeypatch):
    compared = bench_shortcuts.Shortcuts(TINY, stage, 3, 4096, "fp32")
    made = compared.calls(compared.variants)
    for name, call in made.calls.items():
        made.prepare[name]()
        call(None)
    needed = [compared.figures(v, 1.0)["flops_required"] for v in compared.variants]
    assert needed[-1] == 1 and all(share < 1 for share in needed[:-1])
    assert needed[0] == min(needed)
    losses = iter([1.0, 1.1, 1.0, 1.0])
    monkeypatch.setattr(bench_shortcuts.MmalignStep, "loss", lambda step: next(losses))
    with pytest.raises(WrongResult, match="loss 1.1"):
        compared.calls(compared.variants)


# ---- loading and growth ----


def test_images_of_the_loading_benchmark(tmp_path, monkeypatch):
    files = samples.write_jpeg_files(tmp_path, "pretrain", 2)
    assert Image.open(files.paths[0]).size == (640, 480)
    processor = CLIPImageProcessor()
    bench_data_loading.compare_pixels(files.paths[0], processor)
    real = bench_data_loading.load_image
    monkeypatch.setattr(
        bench_data_loading, "load_image", lambda path, size: real(path, size).int() + 2
    )
    with pytest.raises(WrongResult, match="levels"):
        bench_data_loading.compare_pixels(files.paths[0], processor)


def test_places_of_pictures_in_the_benchmark_of_sources(monkeypatch):
    monkeypatch.setattr(bench_data_sources, "SAMPLES", 4)
    compared = bench_data_sources.Sources()
    made = compared.calls(compared.variants)
    assert len(made.calls) == 5
    for call in made.calls.values():
        call()
    monkeypatch.setattr(TarArchive, "read", lambda *_: compared.files.paths[0].read_bytes())
    with pytest.raises(WrongResult, match="mmalign tar: the pixels of .* differ"):
        compared.calls(compared.variants)


def test_the_large_data_of_the_benchmark_of_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data_sources, "NUM_DIFFERENT", 3)
    bench_data_sources.make(tmp_path, 7)
    lines = read_samples(tmp_path / "samples.jsonl", DataConfig())
    pictures = Pictures([str(tmp_path / "images.zip")], follow_links=False)
    read = [pictures.find(x.id, x.images[0]).read() for x in lines]
    assert len(read) == 7 and len(set(read)) == 3


def test_cost_per_unit_counted_by_hand():
    assert bench_scaling.cost_per_unit({1: 10.0, 2: 16.0, 4: 40.0}) == pytest.approx(10 / 8)


def test_growth_of_a_step():
    growth = bench_scaling.Steps("steps", "samples", TINY, [1, 8], lambda count: [64] * count)
    made = growth.calls(growth.variants)
    for name, call in made.calls.items():
        made.prepare[name]()
        call(None)
    assert growth.figures("1 samples", 1.0)["cost_per_unit"] == 1
    assert growth.figures("8 samples", 8.0)["cost_per_unit"] == pytest.approx(1)
    assert growth.figures("8 samples", 12.0)["cost_per_unit"] == pytest.approx(1.5)


def test_documents_are_spread_over_the_file_and_groups_stay_whole():
    def rows(size):
        return [
            Document("ethics_justice", i, ((f"{i}", " a"),), 0, i // size if size > 1 else None)
            for i in range(100)
        ]

    assert [row.doc_id for row in spread(rows(1), 4)] == [0, 25, 50, 75]
    assert [row.doc_id for row in spread(rows(4), 6)] == [0, 1, 2, 3, 48, 49, 50, 51]
    assert spread(rows(4), 1000) == rows(4)


@pytest.mark.parametrize(
    "make, requests, tokens, harness",  # tokens computed by the tree, by lm-evaluation-harness
    [
        (synthetic_truthfulqa, 9_996, 58_983, 1_242_477),
        (synthetic_ethics, 39_936, 1_229_878, 1_921_428),
    ],
)
def test_synthetic_documents_are_as_long_as_the_real_ones(make, requests, tokens, harness):
    plan = plan_scoring(NumberTokenizer(), make(32000), 4096, 32000, 16384, progress=False)
    found = len(plan.unique_of), plan.num_tokens, plan.num_tokens_harness
    assert found == pytest.approx((requests, tokens, harness), rel=0.05)
