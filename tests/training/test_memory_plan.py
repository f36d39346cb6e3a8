"""The memory plan against what the graph really keeps, the state that is made, and refusals."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro

from mmalign.config import ModelConfig, OptimizerConfig, TrainConfig
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.model.recompute import POLICIES
from mmalign.recipes import RECIPES
from mmalign.training.loop import train
from mmalign.training.memory import table as memory_table
from mmalign.training.memory.activations import Activations, MicroBatch
from mmalign.training.memory.plan import MemoryPlan
from mmalign.training.memory.samples import average_sample
from mmalign.training.optimizer import AdamW
from tests.training.activations_kept import (
    decoder_config,
    random_batch,
    saving,
    small_model,
    train_config,
)
from tests.training.helpers import small_config, small_loop, workload_of

CASES = {
    "pretrain": train_config("pretrain"),
    "pretrain-plain": train_config("pretrain", data={"template": "plain"}),
    "pretrain-mlp": train_config("pretrain", model=ModelConfig(projector_type="mlp2x_gelu")),
    "finetune": train_config(),
    "text-only": train_config(data={"text_only": True}),
    "lora": train_config(rank=4, lora={"dropout": 0.3}),
    "lora-no-dropout": train_config(rank=4, lora={"dropout": 0.0}),
    "lora-targets": train_config(
        rank=4, lora={"dropout": 0.1, "targets": ("q_proj", "v_proj", "up_proj")}
    ),
    "lora-text-only": train_config(rank=4, lora={"dropout": 0.3}, data={"text_only": True}),
    "lora-embeddings": train_config(rank=4, lora={"dropout": 0.3, "train_embeddings": True}),
}
DECODERS = {
    "plain": decoder_config(),
    "grouped-query": decoder_config(num_key_value_heads=2, head_dim=40, num_hidden_layers=2),
    "tied": decoder_config(tie_word_embeddings=True, intermediate_size=480),
    "qwen2": decoder_config(model_type="qwen2", num_key_value_heads=2),
    "qwen3": decoder_config(model_type="qwen3", num_key_value_heads=2, head_dim=40),
}
LENGTHS = (40, 7, 66, 1, 30)
H100 = memory_table.capacity_of("h100-80g")


@pytest.mark.parametrize("last_layer_rows", (True, False))
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("case", CASES)
def test_activations_are_those_that_the_graph_keeps(case, decoder, last_layer_rows):
    config = CASES[case]
    if decoder == "tied" and case in ("pretrain", "pretrain-mlp"):
        pytest.skip("a tied lm_head cannot learn two rows alone")
    config = replace(config, shortcuts=replace(config.shortcuts, last_layer_rows=last_layer_rows))
    num_images = 0 if config.data.text_only else 2
    model = small_model(DECODERS[decoder], config).train()
    batch = random_batch(LENGTHS, num_images)
    planned = Activations.from_config(workload_of(model, config), config, "cpu")
    for policy in POLICIES:
        for num_layers in (None, 1):
            model.decoder.set_recompute(policy, num_layers)
            with saving(model, batch) as kept:
                loss = model(batch)
            images = len(batch.image_positions)
            sizes = MicroBatch(sum(LENGTHS), batch.num_loss_tokens, images)
            total = sum(planned.saved(sizes, policy, num_layers).values())
            assert total == kept.bytes, (policy, num_layers)
            del loss


def test_a_run_with_several_pictures_per_sample(small_world, tmp_path, caplog):
    """The plan of the run's own data, against what its first micro-batch keeps."""
    records = json.loads(Path(small_world.finetune_json).read_text())
    pictures = [record["image"] for record in records if "image" in record]
    for i, record in enumerate(records[:8]):
        record.pop("image", None)
        shown = pictures[i : i + i % 5]
        if shown:
            record["image"] = shown
        first = record["conversations"][0]
        first["value"] = "<image>\n" * len(shown) + first["value"].replace("<image>", "").strip()
    (tmp_path / "data.json").write_text(json.dumps(records[:8]))
    data = {"path": str(tmp_path / "data.json")}
    config = small_config(small_world, tmp_path / "run", data=data, recompute="none")
    loop = small_loop(config)
    [batch] = next(iter(loop.loader)).batches
    assert len(batch.pixel_values) == sum(i % 5 for i in range(8))
    dataset, model = loop.loader.dataset, loop.trainer.model
    plan = MemoryPlan(
        config, workload_of(model, config), 0, "cpu", given_sample=average_sample(dataset)
    )
    with saving(model, batch) as kept:
        loss = model(batch)
    planned = plan.batch(len(batch.input_ids))
    patches = len(batch.image_positions)
    assert planned == MicroBatch(len(batch.input_ids), batch.num_loss_tokens, patches)
    assert sum(plan.activations.saved(planned, "none").values()) == kept.bytes
    assumed = replace(plan, given_sample=None).batch(planned.tokens)
    assert assumed.image_rows < patches and assumed.loss_rows > batch.num_loss_tokens
    del loss


@pytest.mark.parametrize("model_type", ("llama", "qwen2", "qwen3"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("master", "moments"), [("split", "fp32"), ("fp32-copy", "8bit"), ("stochastic", "bf16")]
)
def test_weights_gradients_and_state_are_those_that_are_made(case, master, moments, model_type):
    optimizer = OptimizerConfig(master=master, moments=moments)
    config = replace(CASES[case], optimizer=optimizer, precision="bf16")
    model = small_model(decoder_config(model_type=model_type), config).bfloat16()
    plan = MemoryPlan(config, workload_of(model, config), 0, "cpu")
    trained = model.trainable_parameters()
    state = AdamW(trained, optimizer).state()
    made = sum(x.nbytes for x in state.values())
    fixed = plan.fixed()
    assert fixed["optimizer state"] == made
    assert fixed["weights"] == sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in trained.values())
    gradients = sum(p.nbytes for p in trained.values())
    assert plan.at(128, "none")["gradients"] == gradients + largest


def plan_of(recipe: str, capacity: int = H100, world_size: int = 1, **changes) -> MemoryPlan:
    config = replace(RECIPES[recipe][1], **changes)
    workload = memory_table.published_workload(config, recipe)
    return MemoryPlan(config, workload, capacity, "cuda", world_size)


def test_7b_on_80_gb():
    """The figures of the design: 8 bytes per weight leave 8k tokens without a product run twice."""
    plan = plan_of("finetune-7b")
    chosen = memory_table.check(plan)
    assert (chosen.recompute, chosen.recompute_layers) == ("elementwise", None)
    assert 8192 <= plan.most_tokens("elementwise") < 9500
    assert 14_000 < plan.most_tokens("mlp") < 17_000 and plan.most_tokens("full") > 50_000
    fixed = plan.fixed()
    eight_bytes = fixed["weights"] + fixed["optimizer state"] + plan.at(8192, "full")["gradients"]
    numel = sum(x.numel for x in plan.parameters if x.trained)
    assert eight_bytes / numel == pytest.approx(8, rel=0.03)  # the tower and one more gradient
    assert 6.73e9 < numel < 6.75e9
    pretrain = plan_of("pretrain-7b")
    assert memory_table.check(pretrain).recompute == "none"
    assert 20_000 < pretrain.most_tokens("none") < 23_000


def test_activations_of_a_token():
    """Without last_layer_rows: x, q, k, v, o, x, gate, up and little else, 2.98 MB per token."""
    config = replace(RECIPES["finetune-7b"][1], recompute="elementwise")
    config = replace(config, shortcuts=replace(config.shortcuts, last_layer_rows=False))
    workload = memory_table.published_workload(config, "finetune-7b")
    saved = Activations.from_config(workload, config, "cuda").saved(
        MicroBatch(1000, 0, 0), "elementwise"
    )
    layers = saved["residual stream"] + saved["attention"] + saved["mlp"]
    assert layers / 1000 == pytest.approx(2.98e6, rel=0.01)


def test_fp32_state_of_7b_is_refused_with_remedies():
    plan = plan_of("finetune-7b", optimizer=OptimizerConfig())
    with pytest.raises(UserError) as error:
        memory_table.check(plan)
    for words in ("does not fit", "optimizer state", "--optimizer.moments bf16", "--lora.rank 64"):
        assert words in str(error.value)
    assert "--micro-batch-tokens" not in str(error.value)  # none is small enough
    too_many = plan_of("finetune-7b", micro_batch_tokens=16384, recompute="none")
    with pytest.raises(
        UserError, match=r"--micro-batch-tokens 6400 \(or auto\)\n  --recompute auto"
    ):
        memory_table.check(too_many)


def test_each_remedy_that_a_refusal_names_makes_it_fit():
    changes = {"recompute": "none", "optimizer": OptimizerConfig(moments="bf16")}
    with pytest.raises(UserError) as error:
        memory_table.check(plan_of("finetune-7b", **changes))
    remedies = [
        x.strip() for x in str(error.value).partition("makes it fit:")[2].strip().split("\n")
    ]
    assert len(remedies) == 6
    for remedy in remedies:
        if match := re.match(r"a device with (\d+) GB of", remedy):
            memory_table.check(plan_of("finetune-7b", capacity=int(match[1]) * 10**9, **changes))
            continue
        devices = re.search("on ([0-9]+) devices", remedy)
        flags = [x for x in re.findall(r"--[^(,]+", remedy) if "run-dir" not in x]
        settings = " ".join(flags).split()
        config = replace(RECIPES["finetune-7b"][1], **changes)
        config = tyro.cli(TrainConfig, default=config, args=settings)
        workload = memory_table.published_workload(config, "finetune-7b")
        size = int(devices[1]) if devices else 1
        memory_table.check(MemoryPlan(config, workload, H100, "cuda", size))


def test_gradients_of_ddp_lie_in_buckets():
    """Measured with torch: buckets hold all, and several micro-batches add up beside them."""
    numel = sum(x.numel for x in plan_of("finetune-7b").parameters if x.trained)
    several = plan_of("finetune-7b", world_size=2).at(8192, "none")["gradients"]
    one = plan_of("finetune-7b", world_size=8).at(8192, "none")["gradients"]
    assert several == 4 * numel and one < 2.1 * numel


def test_auto_is_decided_once_a_run(small_world, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="mmalign")
    config = small_config(small_world, tmp_path / "run", micro_batch_tokens="auto", num_steps=1)
    train(config)
    decided = re.search("--micro-batch-tokens ([0-9]+)", caplog.text)[1]
    monkeypatch.setattr(memory_table, "_free_memory", lambda ranks: (2 * 10**8, "of free RAM"))
    caplog.clear()
    train(config)  # the same command, where auto would now be less
    assert f"--micro-batch-tokens {decided}" in caplog.text
    path = tmp_path / "run/config.json"
    settings = json.loads(path.read_text())
    for damaged in (0, 10**30, "64", True):
        path.write_text(json.dumps(settings | {"micro_batch_tokens": damaged}))
        with pytest.raises(
            UserError, match=r"config\.json: micro_batch_tokens is .*expected a number"
        ):
            train(config)


def test_a_gpu_that_is_none():
    for text in ("nan", "inf", "-1", "0", "x"):
        with pytest.raises(UserError, match=f"--gpu {text}: expected one of h200"):
            memory_table.capacity_of(text)


@pytest.mark.parametrize("gpu", ("h200", "h100-80g", "a100-80g"))
def test_auto_takes_what_fits(gpu):
    capacity = memory_table.capacity_of(gpu)
    plan = plan_of("finetune-7b", capacity, micro_batch_tokens="auto", recompute="auto")
    chosen = memory_table.check(plan)
    tokens, policy = chosen.micro_batch_tokens, chosen.recompute
    assert 8192 <= tokens <= 16384
    assert plan.total(tokens, policy, chosen.recompute_layers) <= capacity
    assert policy == ("none" if gpu == "h200" else "elementwise")
    if tokens < 16384:
        assert plan.total(tokens + 128, policy, chosen.recompute_layers) > capacity


def test_auto_recomputes_in_as_few_layers_as_it_takes():
    plan = plan_of("finetune-7b", micro_batch_tokens=12_288)
    chosen = memory_table.check(plan)
    layers = chosen.recompute_layers
    assert chosen.recompute == "mlp" and 1 < layers < 32
    assert plan.total(12_288, "mlp", layers) <= H100 < plan.total(12_288, "mlp", layers - 1)


def test_sharding_divides_the_state():
    parallel = replace(RECIPES["finetune-7b"][1].parallel, sharding="full")
    alone, shared = plan_of("finetune-7b"), plan_of("finetune-7b", world_size=8, parallel=parallel)
    ratio = shared.fixed()["optimizer state"] / alone.fixed()["optimizer state"]
    assert ratio == pytest.approx(1 / 8, rel=0.01)
    assert shared.fixed()["gathered weights"] > 0
    hybrid = replace(parallel, sharding="hybrid", shard_size=4)
    quarter = plan_of("finetune-7b", world_size=8, parallel=hybrid).fixed()["optimizer state"]
    assert quarter / alone.fixed()["optimizer state"] == pytest.approx(1 / 4, rel=0.01)


def test_codes_that_cannot_be_sharded_are_refused_before_anything_is_loaded():
    """OpenLLaMA-3B's down_proj has rows of 8640, which are 67.5 blocks of 128."""
    parallel = replace(RECIPES["finetune-7b"][1].parallel, sharding="full")
    optimizer = OptimizerConfig(moments="8bit")
    changes = {"world_size": 8, "parallel": parallel, "optimizer": optimizer}
    with pytest.raises(UserError, match=r"\(3200, 8640\) is not a multiple of 128"):
        memory_table.check(plan_of("finetune-open-llama-3b", **changes))
    memory_table.check(plan_of("finetune-7b", **changes))


def test_a_run_refuses_before_it_loads_anything(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_table, "_free_memory", lambda ranks: (10**6, "of free RAM"))
    with pytest.raises(UserError, match="does not fit"):
        train(small_config(small_world, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("free", "kept", "expected"),
    [(84, 0, 85), (18, 66, 85), (30, 10, 41)],
    ids=["a new process", "after another stage", "beside another process"],
)
def test_free_memory_of_a_gpu(monkeypatch, free, kept, expected):
    """In GB, of a GPU with 85: the allocator's cache is ours, another process's memory is not."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * 10**9, 85 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: (kept + 3) * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * 10**9)
    ranks = DistributedContext(0, 1, torch.device("cuda"))
    assert memory_table._free_memory(ranks) == (expected * 10**9, "free on the GPU")


def test_a_run_takes_the_recommendation(small_world, tmp_path, caplog):
    caplog.set_level("INFO", logger="mmalign")
    changes = {"micro_batch_tokens": "auto", "recompute": "auto", "num_steps": 1}
    train(small_config(small_world, tmp_path / "run", **changes))
    assert "of free RAM, planned with --recompute none --micro-batch-tokens 16384" in caplog.text


@pytest.fixture
def plan_memory(monkeypatch, capsys):
    """The script: (arguments) -> what it prints, or how it ends."""
    script = Path(__file__).resolve().parents[2] / "scripts/plan_memory.py"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    return run


def test_command_line(small_world, plan_memory):
    devices = ("--gpu", "a100-40g", "--world-size", "8")
    printed = plan_memory("finetune-7b", *devices, "--parallel.sharding", "full")
    assert "finetune-7b on 8 x a100-40g of 39.4 GiB (42.3 GB), --parallel.sharding full" in printed
    assert "optimizer state" in printed and "most tokens that fit" in printed
    assert "recommended: --recompute elementwise --micro-batch-tokens 8192" in printed
    whole = plan_memory("finetune-7b", "--world-size", "8")
    assert "with --parallel.sharding full as well: " in whole
    folders = ("--model.decoder", str(small_world.decoder), "--model.vision-tower")
    printed = plan_memory("finetune-7b", *folders, str(small_world.vision_tower))
    assert "recommended: --recompute none" in printed
    assert "does not fit" in plan_memory("finetune-7b", "--optimizer.moments", "fp32")
    data = ("--data.path", str(small_world.finetune_json), "--data.template", "v1")
    data += ("--data.image-root", str(small_world.images))
    printed = plan_memory("finetune-7b", *folders, str(small_world.vision_tower), *data)
    assert re.search(r"tokens per sample \(.*\.json\): \d+ with a target, \d+ of images", printed)
    assert "--model.tokenizer is needed" in plan_memory("finetune-7b", *data)
    hybrid = ("--world-size", "8", "--parallel.sharding", "hybrid", "--parallel.shard-size", "3")
    assert "3 does not divide --world-size 8" in plan_memory("finetune-7b", *hybrid)
    assert "expected one of h200" in plan_memory("finetune-7b", "--gpu", "abacus")
    assert "a GPU of 100.5 GiB" in plan_memory("finetune-7b", "--gpu", "100.5")
