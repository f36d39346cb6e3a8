"""Out of memory: which step, which settings help, and a memory snapshot.

On a GPU the allocator always records the Python traces of its last allocations. PyTorch puts one
trace at about 2 microseconds (docs/stable/torch_cuda_memory): some milliseconds of the seconds of a
7B step, on the host, which runs ahead of the device.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mmalign.config import TrainConfig
from mmalign.data.loader import Step
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError

log = logging.getLogger("mmalign")
HISTORY_ENTRIES = 50_000  # allocations and frees: a few steps of a 7B model, about 50 MB


@contextmanager
def memory_history(device: torch.device) -> Iterator[None]:
    """Inside, CUDA's allocator records which lines allocate; a no-op on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(
        context="alloc", stacks="python", max_entries=HISTORY_ENTRIES
    )
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def explain_out_of_memory(
    config: TrainConfig, ranks: DistributedContext, step: Step | None = None
) -> Iterator[None]:
    """Turns an out-of-memory error of the block into a UserError, with a snapshot on a GPU.

    step: the optimizer step that runs; None while the model is being built.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _is_out_of_memory(error):
            raise
        where = f"step {step.index + 1}" if step else "building the model"
        name = f"out_of_memory_step_{step.index + 1}" if step else "out_of_memory_build"
        path = config.run_dir / f"{name}_rank_{ranks.rank}.pickle"
        raise UserError(
            f"out of memory in {where}: {_first_line(error)}. {_numbers(step, config)}"
            f"{_remedies(config, step)} {_snapshot(path, ranks.device)}"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text and ("memory" in text or "allocate" in text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _numbers(step: Step | None, config: TrainConfig) -> str:
    if step is None:
        return ""
    tokens = [len(batch.input_ids) for batch in step.batches]
    samples = [len(batch.cu_seqlens) - 1 for batch in step.batches]
    largest = tokens.index(max(tokens))
    longest = max(batch.max_seqlen for batch in step.batches)
    return (
        f"This rank's part of the step: {len(tokens)} micro-batches, {sum(samples)} samples, "
        f"{sum(tokens)} tokens; the largest micro-batch has {tokens[largest]} tokens in "
        f"{samples[largest]} samples, {step.batches[largest].num_loss_tokens} of them supervised; "
        f"the longest sample has {longest} tokens. "
    )


def _remedies(config: TrainConfig, step: Step | None) -> str:
    """Settings that would help and are not in use yet, the cheapest first."""
    settings = []
    if step:
        longest = max(batch.max_seqlen for batch in step.batches)
        largest = max(len(batch.input_ids) for batch in step.batches)
        if longest < largest:
            half = max(longest, largest // 2)
            settings.append(
                f"lower --micro-batch-tokens (now {config.micro_batch_tokens}), for example to "
                f"{half}, not below the longest sample of the data: the same run resumes"
            )
        else:
            settings.append(
                f"leave out long samples: --data.max-length below {config.data.max_length} with "
                "--data.on-bad-sample skip (needs a new --run-dir)"
            )
    if step and (config.recompute, config.recompute_layers) != ("full", None):
        settings.append(f"--recompute mlp or full (now {config.recompute}): the same run resumes")
    if config.stage == "finetune" and config.lora.rank == 0 and config.optimizer.moments != "8bit":
        settings.append("--optimizer.moments 8bit (new --run-dir)")
    if config.precision == "fp32":
        settings.append("--precision bf16 (new --run-dir) halves weights and activations")
    if config.stage == "finetune" and config.lora.rank == 0:
        settings.append(
            "--lora.rank 64 (new --run-dir): no gradients and moments of the whole decoder"
        )
    if config.lora.rank and config.lora.train_embeddings:
        settings.append("--lora.train-embeddings False (new --run-dir)")
    settings.append("a smaller --model.decoder, or a device with more memory")
    return "Change one of these settings: " + "; ".join(settings) + "."


def _snapshot(path: Path, device: torch.device) -> str:
    """Writes the allocator's blocks; returns where, or why not."""
    if device.type != "cuda":
        return "(PyTorch takes memory snapshots on CUDA devices only.)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as error:
        return f"The memory snapshot {path} could not be written: {error}"
    return f"Memory snapshot: {path} (pytorch.org/memory_viz shows it)."
