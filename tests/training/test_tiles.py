"""Training on LLaVA 1.6's tiles: loss, gradients and memory of a packed batch, and a whole run."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessor

from mmalign.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.loader import StepLoader
from mmalign.errors import SampleError
from mmalign.model.hf import load_llava
from mmalign.model.hf.names import decoder_parts
from mmalign.training.build import build_dataset, build_model
from mmalign.training.loop import train
from mmalign.training.memory.plan import MemoryPlan
from mmalign.training.memory.samples import average_sample
from tests.model.hf.test_tiles import Published, published  # noqa: F401  a fixture
from tests.model.tiny import assert_same
from tests.training.activations_kept import saving
from tests.training.helpers import exported_weights, losses, workload_of
from tests.training.train_processes import start

pytestmark = pytest.mark.parametrize("published", ["llama-3"], indirect=True)
SAMPLES = {  # question, pictures
    "two": ("<image>\n<image>\nWhich one is red?", ["wide", "tall"]),
    "text": ("What is red?", []),
    "line": ("<image>\nWhat is it?", ["line"]),
    "odd": ("<image>\nIs it red?", ["odd"]),
}


@pytest.fixture(params=["pretrain", "finetune"])
def config(request, published: Published, tmp_path) -> TrainConfig:  # noqa: F811
    records = []
    for name, (question, pictures) in SAMPLES.items():
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "No, it is grey."}]
        images = [f"{picture}.png" for picture in pictures]
        records.append({"id": name, "conversations": turns} | ({"image": images} if images else {}))
    (tmp_path / "data.json").write_text(json.dumps(records))
    folder = str(published.folder)
    return TrainConfig(
        stage=request.param,
        run_dir=tmp_path / "run",
        model=ModelConfig(folder, folder, tokenizer=folder, projector_type="mlp2x_gelu"),
        data=DataConfig(
            path=str(tmp_path / "data.json"),
            image_root=str(published.pictures),
            use_im_start_end=False,
            shuffle=False,
            num_workers=0,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0),
        global_batch_size=4,
        micro_batch_tokens=2048,
        num_steps=3,
        precision="fp32",
        device="cpu",
    )


def test_loss_gradients_and_memory_of_a_packed_batch(config, published):  # noqa: F811
    """Against transformers, one sample at a time, and what the memory plan expects."""
    dataset = build_dataset(config, published.tokenizer)
    report = check_samples(dataset, progress=False)
    assert report.num_images.tolist() == [2, 0, 1, 1] and report.num_tiles.tolist() == [8, 0, 4, 5]
    sizes = dict(global_batch_size=4, micro_batch_tokens=2048, num_steps=1, seed=0)
    [step] = StepLoader(dataset, report, **sizes)
    [batch] = step.batches
    model = build_model(config, published.tokenizer, [])
    with saving(model, batch) as kept:
        loss = model(batch)
    sample = average_sample(dataset)
    plan = MemoryPlan(config, workload_of(model, config), 0, "cpu", given_sample=sample)
    assert plan.fixed()["weights"] == sum(p.nbytes for p in model.parameters())
    planned, patches = plan.batch(len(batch.input_ids)), len(batch.image_positions)
    assert planned.loss_rows == batch.num_loss_tokens
    newlines = planned.image_rows - patches  # which the plan takes for patches
    assert 0 < newlines == (batch.input_ids == published.tokenizer.image_token_id).sum() - patches
    saved = plan.activations.saved(replace(planned, image_rows=patches), "none")
    assert sum(saved.values()) == kept.bytes
    loss.backward()
    theirs = published.theirs
    expected = sum(their_loss(theirs, published, dataset, i) for i in range(len(dataset)))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = {"projector.0": "linear_1", "projector.2": "linear_2"}
    for ours, layer in pairs.items():
        for name in ("weight", "bias"):
            parameter = theirs.model.multi_modal_projector.get_parameter(f"{layer}.{name}")
            assert_same(model.get_parameter(f"{ours}.{name}").grad, parameter.grad, ours)
    if config.stage == "pretrain":
        assert model.trainable_parameters().keys() == dict(named(model.projector)).keys()
        return
    assert_same(model.image_newline.grad, theirs.model.image_newline.grad, "image_newline")
    for key, part in decoder_parts(model.decoder.config).items():
        found = model.decoder.get_parameter(part.parameter).grad[part.rows]
        name = key.replace("model.", "model.language_model.", 1)
        assert_same(found, theirs.get_parameter(name).grad, key)


def named(projector):
    return ((f"projector.{name}", p) for name, p in projector.named_parameters())


def their_loss(theirs, published, dataset: ConversationDataset, index: int):  # noqa: F811
    sample, images = dataset.encode(index), {}
    if sample.images:
        processor = LlavaNextImageProcessor.from_pretrained(published.folder)
        images = processor([Image.open(path) for path in sample.images], return_tensors="pt")
    ids, labels = (torch.from_numpy(x).long() for x in (sample.input_ids, sample.labels))
    logits = theirs(input_ids=ids[None], **images).logits[0]
    return cross_entropy(logits[:-1], labels[1:], reduction="sum")


def test_a_run_learns_and_its_export_loads(config, published):  # noqa: F811
    train(config)
    assert losses(config.run_dir)[-1] < losses(config.run_dir)[0]
    if config.stage == "pretrain":
        return
    folder = config.run_dir / "export" / "llava"
    ours = load_llava(folder, published.tokenizer)
    theirs, info = LlavaNextForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(ours.image_newline, theirs.model.image_newline)
    assert not torch.equal(ours.image_newline, published.theirs.model.image_newline)
    # a run that goes on from it takes its image_newline, not that of the tower's folder
    again = replace(config, model=replace(config.model, decoder=str(folder)))
    model = build_model(again, published.tokenizer, [])
    assert torch.equal(model.image_newline, ours.image_newline)


@pytest.mark.parametrize("config", ["finetune"], indirect=True)
def test_sharded_runs_equal_one_process(config, published, tmp_path):  # noqa: F811
    """A micro-batch in each of two processes."""
    config = replace(config, micro_batch_tokens=140)
    train(config)
    sharding = ParallelConfig(sharding="full")
    sharded = replace(config, run_dir=tmp_path / "sharded", parallel=sharding)
    start(sharded, 2).succeed()
    expected, found = torch.tensor(losses(config.run_dir)), torch.tensor(losses(sharded.run_dir))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    ours, theirs = exported_weights(config.run_dir), exported_weights(sharded.run_dir)
    name = "export/llava/model.safetensors:image_newline"
    torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def test_a_picture_that_cannot_be_measured_names_its_sample(config, published, tmp_path):  # noqa: F811
    (tmp_path / "wide.png").write_bytes(b"no picture")
    data = replace(config.data, image_root=str(tmp_path))
    dataset = build_dataset(replace(config, data=data), published.tokenizer)
    with pytest.raises(SampleError, match=r"'two': .*wide\.png cannot be decoded"):
        dataset.encode(0)
