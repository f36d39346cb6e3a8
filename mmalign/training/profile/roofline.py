"""Roofline bounds: the least time of each category of a step, from a device's measured peaks.

Matrix products and attention: the required FLOPs over the rate of a large matrix product. Attention
and the other categories: bytes that must be read and written once (mmalign_kernels.costs) over the
bandwidth of a large copy. Waiting, copies and idle time have a bound of 0.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mmalign_kernels import costs, linear

from mmalign.batch import PackedBatch
from mmalign.config import OptimizerConfig, TrainConfig
from mmalign.data.loader import Step
from mmalign.flops import Flops, Workload, num_images, required_flops
from mmalign.training.profile.timeline import (
    ATTENTION,
    COMMUNICATION,
    COPIES,
    DATA_WAIT,
    ELEMENTWISE,
    IDLE,
    LOSS,
    MATRIX,
    NORMS,
    OPTIMIZER,
)


@dataclass(frozen=True)
class MeasuredPeaks:
    copy_bytes_per_second: float  # read and written
    matrix_flops_per_second: float


def measure_peaks(device: torch.device, dtype: torch.dtype) -> MeasuredPeaks:
    """Large copies and matrix products on random data, in the run's dtype; about a second."""
    on_gpu = device.type == "cuda"
    numel, size = (1 << 27, 8192) if on_gpu else (1 << 24, 1024)
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        source = torch.randn(numel, device=device, dtype=dtype, generator=generator)
        target = torch.empty_like(source)
        copy = _fastest(lambda: target.copy_(source), device)
        shape = (2, size, size)
        x, weight = torch.randn(shape, device=device, dtype=dtype, generator=generator)
        product = _fastest(lambda: linear(x, weight), device)
    return MeasuredPeaks(2 * source.nbytes / copy, 2 * size**3 / product)


def _fastest(call: Callable[[], object], device: torch.device, repeats: int = 8) -> float:
    """Seconds of one call, after warm-up."""
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])


def roofline_bounds(
    workload: Workload,
    steps: list[Step],
    parameters: dict[str, torch.nn.Parameter],
    dtype: torch.dtype,
    peaks: MeasuredPeaks,
    config: TrainConfig,
) -> dict[str, float | None]:
    """Seconds by category for one rank's part of `steps`; None: unknown (communication).

    parameters: the trained ones; dtype: of weights and activations.
    """
    flops = sum((_required(workload, config, b) for step in steps for b in step.batches), Flops())
    moved = {ATTENTION: 0, NORMS: 0, ELEMENTWISE: 0}
    for step in steps:
        for batch in step.batches:
            decoder = _decoder_bytes(workload, batch.cu_seqlens.tolist(), dtype.itemsize)
            tower = _tower_bytes(workload, len(batch.pixel_values), dtype.itemsize)
            for category in moved:
                moved[category] += decoder[category] + tower[category]
    rate, bandwidth = peaks.matrix_flops_per_second, peaks.copy_bytes_per_second
    products = flops.projections + flops.adapters + flops.projector + flops.tower
    attention = (flops.attention + flops.tower_attention) / rate
    return {
        MATRIX: products / rate,
        ATTENTION: max(attention, moved[ATTENTION] / bandwidth),
        NORMS: moved[NORMS] / bandwidth,
        ELEMENTWISE: moved[ELEMENTWISE] / bandwidth,
        LOSS: flops.lm_head / rate,
        OPTIMIZER: len(steps) * _optimizer_bytes(parameters, config.optimizer) / bandwidth,
        COMMUNICATION: None,
        DATA_WAIT: 0.0,
        COPIES: 0.0,
        IDLE: 0.0,
    }


def _required(workload: Workload, config: TrainConfig, batch: PackedBatch) -> Flops:
    lengths = (batch.cu_seqlens.diff() + batch.prefix_length).tolist()
    sizes = lengths, batch.num_loss_tokens, num_images(workload, batch)
    return required_flops(workload, config.shortcuts, *sizes, batch.prefix_length)


def _decoder_bytes(workload: Workload, cu_seqlens: list[int], itemsize: int) -> dict[str, int]:
    decoder, tokens = workload.decoder, cu_seqlens[-1]
    layers, hidden = decoder.num_hidden_layers, decoder.hidden_size
    heads = (decoder.num_attention_heads, decoder.num_key_value_heads, decoder.head_dim)
    trained, rows = workload.trains_decoder, (tokens, hidden, itemsize)
    attention = costs.rotary_attention(cu_seqlens, *heads, itemsize).both.bytes
    first_norm = costs.rms_norm(*rows, trained).both.bytes
    norm = costs.add_rms_norm(*rows, trained).both.bytes
    swiglu = costs.swiglu(tokens, decoder.intermediate_size, itemsize).both.bytes
    return {
        ATTENTION: layers * attention,
        NORMS: first_norm + 2 * layers * norm,
        ELEMENTWISE: layers * swiglu + 2 * tokens * hidden * itemsize,  # and the embeddings
    }


def _tower_bytes(workload: Workload, num_images: int, itemsize: int) -> dict[str, int]:
    vision = workload.vision
    if vision is None or num_images == 0:
        return dict.fromkeys((ATTENTION, NORMS, ELEMENTWISE), 0)
    seqlen, layers = vision.seqlen, vision.num_layers_used
    tokens, hidden = num_images * seqlen, vision.hidden_size
    cu_seqlens = list(range(0, tokens + 1, seqlen))
    heads = vision.num_attention_heads
    attention = costs.full_attention(cu_seqlens, heads, hidden // heads, itemsize).forward.bytes
    norm = costs.layer_norm(tokens, hidden, itemsize).forward.bytes
    gelu = costs.quick_gelu(tokens * vision.intermediate_size, itemsize).forward.bytes
    additions = 2 * 3 * tokens * hidden * itemsize
    return {
        ATTENTION: layers * attention,
        NORMS: (2 * layers + 1) * norm,
        ELEMENTWISE: layers * (gelu + additions),
    }


def _optimizer_bytes(parameters: dict[str, torch.nn.Parameter], optimizer: OptimizerConfig) -> int:
    """The update, and reading the gradients once more for their norm."""
    total = 0
    for parameter in parameters.values():
        numel, size = parameter.numel(), parameter.element_size()
        in_bf16 = parameter.dtype == torch.bfloat16
        mode = optimizer.master if in_bf16 and optimizer.master != "fp32-copy" else "fp32"
        moments = optimizer.moments if parameter.dim() > 1 else "fp32"
        total += costs.adamw_step(numel, mode, size, moments).bytes + numel * size
        if in_bf16 and optimizer.master == "fp32-copy":
            total += numel * size  # the weight, rounded from its copy
    return total
