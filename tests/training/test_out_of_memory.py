"""A run without enough memory: which step it was, which setting helps, and what it leaves."""

from pathlib import Path

import pytest
import torch

from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.training.loop import train
from mmalign.training.optimizer import AdamW
from mmalign.training.out_of_memory import explain_out_of_memory, memory_history
from tests.training.helpers import CPU, losses, small_config, small_loop


def cpu_allocation_error() -> None:
    """The real error of PyTorch's CPU allocator: more bytes than any address space has."""
    torch.empty(1 << 60)


def raise_at_step(monkeypatch, number: int, fail) -> None:
    gradient_norm = AdamW.gradient_norm

    def fail_once(optimizer):
        if optimizer.step_count == number - 1:
            fail()
        return gradient_norm(optimizer)

    monkeypatch.setattr(AdamW, "gradient_norm", fail_once)


def raise_(error: BaseException):
    raise error


@pytest.mark.parametrize(
    "fail",
    [
        cpu_allocation_error,
        lambda: raise_(MemoryError()),
        lambda: raise_(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    ],
    ids=["cpu allocator", "MemoryError", "torch.OutOfMemoryError"],
)
def test_the_error_names_the_step_and_its_numbers(small_world, tmp_path, monkeypatch, fail):
    config = small_config(small_world, tmp_path, micro_batch_tokens=700)
    third = list(small_loop(small_config(small_world, tmp_path / "plan")).loader)[2]
    lengths = third.batches[0].cu_seqlens.diff().tolist()
    with monkeypatch.context() as patched:
        raise_at_step(patched, 3, fail)
        with pytest.raises(UserError, match="out of memory in step 3") as caught:
            train(config)
    message = str(caught.value)
    assert f"8 samples, {sum(lengths)} tokens" in message
    assert f"longest sample has {max(lengths)} tokens" in message
    first = "--micro-batch-tokens (now 700)", "--recompute mlp or full (now none): the same run"
    for setting in (*first, "--optimizer.moments 8bit", "--precision bf16", "--lora.rank"):
        assert setting in message
    assert "CUDA devices only" in message
    assert (tmp_path / "checkpoints" / "step_2").is_dir()
    advised = {"micro_batch_tokens": 400, "recompute": "mlp"}
    train(small_config(small_world, tmp_path, **advised))  # the advice can be followed
    assert len(losses(tmp_path)) == 6


def test_other_errors_pass_through(small_world, tmp_path):
    with (
        pytest.raises(RuntimeError, match="size mismatch"),
        explain_out_of_memory(small_config(small_world, tmp_path), CPU),
    ):
        raise RuntimeError("size mismatch")


def test_settings_in_use_are_not_proposed(small_world, tmp_path):
    used = {"precision": "bf16", "recompute": "full"}
    config = small_config(small_world, tmp_path, "pretrain", **used)
    with (
        pytest.raises(UserError, match="out of memory in building the model") as caught,
        explain_out_of_memory(config, CPU),
    ):
        raise MemoryError
    message = str(caught.value)
    for setting in ("--precision", "--lora", "--recompute", "--optimizer"):
        assert setting not in message
    assert "--micro-batch-tokens" not in message and "--model.decoder" in message


def test_snapshot_on_a_gpu(small_world, tmp_path, monkeypatch):
    """CUDA's allocator stands aside; the calls are those that it documents."""
    calls = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **kw: calls.append(kw))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"blocks"))
    gpu = DistributedContext(3, 4, torch.device("cuda", 3))
    with memory_history(CPU.device):
        assert not calls
    with memory_history(gpu.device):
        assert calls[0]["stacks"] == "python" and calls[0]["max_entries"] < 100_000
    assert calls[1] == {"enabled": None}
    config = small_config(small_world, tmp_path / "run")
    step = next(iter(small_loop(small_config(small_world, tmp_path / "plan")).loader))
    with (
        pytest.raises(UserError, match="out_of_memory_step_1_rank_3.pickle"),
        explain_out_of_memory(config, gpu, step),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    path = config.run_dir / "out_of_memory_step_1_rank_3.pickle"
    assert path.read_bytes() == b"blocks"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_snapshot_of_a_real_gpu(small_world, tmp_path):
    gpu = DistributedContext(0, 1, torch.device("cuda", 0))
    with (
        memory_history(gpu.device),
        pytest.raises(UserError, match="out_of_memory_build_rank_0.pickle"),
        explain_out_of_memory(small_config(small_world, tmp_path), gpu),
    ):
        torch.empty(1 << 45, device=gpu.device)
    assert (tmp_path / "out_of_memory_build_rank_0.pickle").stat().st_size > 0
