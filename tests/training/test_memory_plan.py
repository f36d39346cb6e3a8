"""The memory plan against what the graph really keeps, the state that is made, and refusals."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmalign.config import OptimizerConfig
from mmalign.errors import UserError
from mmalign.model.recompute import POLICIES, set_recompute
from mmalign.recipes import RECIPES
from mmalign.training import memory_table
from mmalign.training.activations import Activations, MicroBatch
from mmalign.training.flops import Workload
from mmalign.training.memory_plan import MemoryPlan
from mmalign.training.optimizer import AdamW
from mmalign.training.published import published_workload
from mmalign.training.trainer import train
from tests.training.runs import small_config
from tests.training.saved import decoder_config, random_batch, saving, small_model, train_config

CASES = {
    "pretrain": train_config("pretrain"),
    "pretrain-plain": train_config("pretrain", data={"template": "plain"}),
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
}
LENGTHS = (40, 7, 66, 1, 30)
H100 = memory_table.capacity_of("h100-80g")


@pytest.mark.parametrize("prunes", (True, False))
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("case", CASES)
def test_activations_are_those_that_the_graph_keeps(case, decoder, prunes):
    config = CASES[case]
    if decoder == "tied" and case == "pretrain":
        pytest.skip("a tied lm_head cannot learn two rows alone")
    config = replace(config, shortcuts=replace(config.shortcuts, last_layer_rows=prunes))
    num_images = 0 if config.data.text_only else 2
    model = small_model(DECODERS[decoder], config).train()
    batch = random_batch(LENGTHS, num_images)
    planned = Activations.of(Workload.of(model, config), config, "cpu")
    for policy in POLICIES:
        for num_layers in (None, 1):
            set_recompute(model.decoder, policy, num_layers)
            with saving(model, batch) as saved:
                loss = model(batch)
            sizes = MicroBatch(sum(LENGTHS), batch.num_loss_tokens, num_images)
            total = sum(planned.kept(sizes, policy, num_layers).values())
            assert total == saved.bytes, (policy, num_layers)
            del loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("master", "moments"), [("split", "fp32"), ("fp32-copy", "8bit"), ("stochastic", "bf16")]
)
def test_weights_gradients_and_state_are_those_that_are_made(case, master, moments):
    optimizer = OptimizerConfig(master=master, moments=moments)
    config = replace(CASES[case], optimizer=optimizer, precision="bf16")
    model = small_model(decoder_config(), config).bfloat16()
    plan = MemoryPlan(config, Workload.of(model, config), 0, "cpu")
    trained = model.trainable_parameters()
    state = AdamW(trained, optimizer).state()
    made = sum(x.nbytes for name, x in state.items() if not name.startswith("parameter."))
    fixed = plan.fixed()
    assert fixed["optimizer state"] == made
    assert fixed["weights"] == sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in trained.values())
    gradients = sum(p.nbytes for p in trained.values())
    assert plan.at(128, "none")["gradients"] == gradients + largest


def plan_of(recipe: str, capacity: int = H100, world_size: int = 1, **changes) -> MemoryPlan:
    config = replace(RECIPES[recipe][1], **changes)
    workload = published_workload(config, recipe)
    return MemoryPlan(config, workload, capacity, "cuda", world_size)


def test_7b_on_80_gb():
    """The figures of the design: 8 bytes a weight leave 8k tokens without a product run twice."""
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
    """Without row pruning, LLaMA2-7B keeps x, q, k, v, o, x, gate, up and little else: 2.98 MB."""
    config = replace(RECIPES["finetune-7b"][1], recompute="elementwise")
    config = replace(config, shortcuts=replace(config.shortcuts, last_layer_rows=False))
    workload = published_workload(config, "finetune-7b")
    kept = Activations.of(workload, config, "cuda").kept(MicroBatch(1000, 0, 0), "elementwise")
    layers = kept["residual stream"] + kept["attention"] + kept["mlp"]
    assert layers / 1000 == pytest.approx(2.98e6, rel=0.01)


def test_fp32_state_of_7b_is_refused_with_the_knobs():
    plan = plan_of("finetune-7b", optimizer=OptimizerConfig())
    with pytest.raises(UserError) as error:
        memory_table.check(plan)
    for words in ("does not fit", "optimizer state", "--optimizer.moments bf16", "--lora.rank 64"):
        assert words in str(error.value)
    too_many = plan_of("finetune-7b", micro_batch_tokens=16384, recompute="none")
    with pytest.raises(UserError, match=r"--micro-batch-tokens \d+ \(or auto\); --recompute full"):
        memory_table.check(too_many)


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


def test_a_run_refuses_before_it_loads_anything(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_table, "_free_memory", lambda ranks: (10**6, "of free RAM"))
    with pytest.raises(UserError, match="does not fit"):
        train(small_config(small_world, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_takes_the_recommendation(small_world, tmp_path, caplog):
    caplog.set_level("INFO", logger="mmalign")
    changes = {"micro_batch_tokens": "auto", "recompute": "auto", "num_steps": 1}
    train(small_config(small_world, tmp_path / "run", **changes))
    assert "of free RAM, planned with --recompute none --micro-batch-tokens 16384" in caplog.text


def test_command_line(small_world):
    script = Path(__file__).resolve().parents[2] / "scripts/plan_memory.py"

    def run(*arguments):
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    result = run(
        "finetune-7b", "--gpu", "a100-40g", "--world-size", "8", "--parallel.sharding", "full"
    )
    assert result.returncode == 0, result.stderr
    assert "optimizer state" in result.stdout and "most tokens that fit" in result.stdout
    assert "recommended: --recompute " in result.stdout
    folders = ("--model.decoder", str(small_world.decoder), "--model.vision-tower")
    result = run("finetune-7b", *folders, str(small_world.vision_tower))
    assert "recommended: --recompute none" in result.stdout, result.stderr
    result = run("finetune-7b", "--optimizer.moments", "fp32")
    assert result.returncode != 0 and "does not fit" in result.stderr
    assert "not one of a100-40g" in run("finetune-7b", "--gpu", "abacus").stderr
