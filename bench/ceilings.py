"""What this card can do at most, measured in the run that is compared with it.

Bytes a second of a large copy, and FLOPs a second of matrix products: one large square product,
and on a GPU the products of LLaMA2-7B's layers, forward and both backward forms, in bf16 and FP8.
Random operands (zeros run faster), all cases in turn in every round, medians over the rounds.
"""

import statistics
import time
from collections.abc import Callable

import torch

MODEL = "llama2-7b"
LAYERS = {  # name: (in_features, out_features), as the packed decoder multiplies them
    "qkv": (4096, 12288),
    "o": (4096, 4096),
    "gate_up": (4096, 22016),
    "down": (11008, 4096),
    "lm_head": (4096, 32000),
}
NUM_TOKENS = 16384  # of one large micro-batch
FP8_CAPABILITY = (8, 9)  # first with FP8 matrix units
GPU_ROUNDS, CPU_ROUNDS = 25, 5

Case = tuple[str, int, Callable[[], object]]  # name, bytes or FLOPs of one call, the call


def ceilings(device: torch.device | str) -> dict:
    """Measures `device`: copy (bytes read + written) and matrix products, per second.

    {"copy_bytes_per_second", "matrix_flops_per_second": {name: rate}, "matrix_reference": name};
    the reference is the denominator of shares and of MFU. Needs 12 GB of a card, and frees them.
    """
    device = torch.device(device)
    with torch.no_grad():
        measured = _measure(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measured


def _measure(device: torch.device) -> dict:
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    copy = _copy(device, 1 << 30 if on_gpu else 1 << 26, generator)
    size, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    products = [_square(size, dtype, device, generator)]
    if on_gpu:
        products += _layer_products(device, generator)
    seconds = _medians([copy, *products], device, GPU_ROUNDS if on_gpu else CPU_ROUNDS)
    rates = {name: amount / seconds[name] for name, amount, _ in [copy, *products]}
    return {
        "copy_bytes_per_second": rates.pop(copy[0]),
        "matrix_flops_per_second": rates,
        "matrix_reference": products[0][0],
    }


def _copy(device: torch.device, numel: int, generator: torch.Generator) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.randn(numel, device=device, dtype=dtype, generator=generator)
    target = torch.empty_like(source)
    return "copy", 2 * source.nbytes, lambda: target.copy_(source)


def _square(size: int, dtype: torch.dtype, device: torch.device, generator) -> Case:
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in "ab")
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return f"{name} {size}x{size}x{size}", 2 * size**3, lambda: a @ b


def _layer_products(device: torch.device, generator: torch.Generator) -> list[Case]:
    """forward x W^T, grad_input dy W and grad_weight dy^T x of every layer."""

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16, generator=generator)

    cases, with_fp8 = [], torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    for layer, (in_features, out_features) in LAYERS.items():
        x = random(NUM_TOKENS, in_features)
        weight = random(out_features, in_features)
        grad = random(NUM_TOKENS, out_features)
        flops = 2 * NUM_TOKENS * in_features * out_features
        forms = {"forward": (x, weight.T), "grad_input": (grad, weight), "grad_weight": (grad.T, x)}
        for form, (a, b) in forms.items():
            cases.append((f"{MODEL} {layer} {form} bf16", flops, lambda a=a, b=b: a @ b))
            if with_fp8:
                cases.append((f"{MODEL} {layer} {form} fp8", flops, _fp8_product(a, b)))
    return cases


def _fp8_product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    """a @ b of operands that are FP8 already and lie as cuBLAS wants them: rows by columns."""
    left = a.to(torch.float8_e4m3fn).contiguous()
    right = b.T.to(torch.float8_e4m3fn).contiguous().T
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(
        left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _medians(cases: list[Case], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of one call each, warm; a round runs all in turn, so drift meets all alike."""
    seconds = {name: [] for name, _, _ in cases}
    timed = _round_on_gpu if device.type == "cuda" else _round_on_cpu
    for repeat in range(rounds + 2):
        taken = timed([call for _, _, call in cases])
        if repeat >= 2:  # two rounds warm clocks, caches and libraries
            for (name, _, _), one in zip(cases, taken, strict=True):
                seconds[name].append(one)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _round_on_gpu(calls: list[Callable[[], object]]) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    for call, (begin, end) in zip(calls, events, strict=True):
        begin.record()  # the queue stays full: no launch gap is timed
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def _round_on_cpu(calls: list[Callable[[], object]]) -> list[float]:
    taken = []
    for call in calls:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return taken
