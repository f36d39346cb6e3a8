"""What this card can do at most, measured in the run that is compared with it.

Bytes a second of a large copy, and FLOPs a second of matrix products: one large square product,
and on a GPU the products of LLaMA2-7B's layers, forward and both backward forms, in bf16 and FP8.
Random operands (zeros run faster), all cases in turn in every round, medians over the rounds.
"""

from collections.abc import Callable

import torch
from mmalign_kernels import linear

from bench.shapes import LLAMA2_7B, NAMES, NUM_TOKENS
from bench.timing import measure

FP8_CAPABILITY = (8, 9)  # first with FP8 matrix units
ROUNDS = {"cuda": 25, "cpu": 5}

Case = tuple[str, int, Callable[[], object]]  # name, bytes or FLOPs of one call, the call


def ceilings(device: torch.device | str) -> dict:
    """Measures `device`: copy (bytes read + written) and matrix products, per second.

    {"copy_bytes_per_second", "matrix_flops_per_second": {name: rate}, "matrix_reference": name};
    the reference, the fastest square product, is the denominator of shares and of MFU. Needs 12 GB
    of a card, and frees them.
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
    squares = _squares(size, dtype, device, generator)
    products = [*squares]
    if on_gpu:
        products += _layer_products(device, generator)
    rounds = ROUNDS[device.type]
    calls = {name: call for name, _, call in [copy, *products]}
    taken = measure(calls, device, min_rounds=rounds, max_rounds=rounds)
    rates = {name: amount / taken[name].median for name, amount, _ in [copy, *products]}
    return {
        "copy_bytes_per_second": rates.pop(copy[0]),
        "matrix_flops_per_second": rates,
        "matrix_reference": max((name for name, _, _ in squares), key=rates.get),
    }


def _copy(device: torch.device, numel: int, generator: torch.Generator) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.randn(numel, device=device, dtype=dtype, generator=generator)
    target = torch.empty_like(source)
    return "copy", 2 * source.nbytes, lambda: target.copy_(source)


def _squares(size: int, dtype: torch.dtype, device: torch.device, generator) -> list[Case]:
    """By each library that may do it: on a CPU PyTorch's own choice, and ours where it differs."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in "ab")
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype] + f" {size}x{size}x{size}"
    cases = [(name, 2 * size**3, lambda: a @ b)]
    if device.type == "cpu":
        cases.append((f"{name} mmalign_kernels.linear", 2 * size**3, lambda: linear(a, b)))
    return cases


def _layer_products(device: torch.device, generator: torch.Generator) -> list[Case]:
    """forward x W^T, grad_input dy W and grad_weight dy^T x of every layer."""

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16, generator=generator)

    cases, with_fp8 = [], torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    for layer, (in_features, out_features) in _layers().items():
        x = random(NUM_TOKENS, in_features)
        weight = random(out_features, in_features)
        grad = random(NUM_TOKENS, out_features)
        flops = 2 * NUM_TOKENS * in_features * out_features
        forms = {"forward": (x, weight.T), "grad_input": (grad, weight), "grad_weight": (grad.T, x)}
        for form, (a, b) in forms.items():
            name = f"{NAMES[LLAMA2_7B]} {layer} {form}"
            cases.append((f"{name} bf16", flops, lambda a=a, b=b: a @ b))
            if with_fp8:
                cases.append((f"{name} fp8", flops, _fp8_product(a, b)))
    return cases


def _layers() -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every product of the packed decoder."""
    config = LLAMA2_7B
    hidden, inner, query = config.hidden_size, config.intermediate_size, config.qkv_sizes[0]
    return {
        "qkv": (hidden, sum(config.qkv_sizes)),
        "o": (query, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
        "lm_head": (hidden, config.vocab_size),
    }


def _fp8_product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    """a @ b of operands that are FP8 already and lie as cuBLAS wants them: rows by columns."""
    left = a.to(torch.float8_e4m3fn).contiguous()
    right = b.T.to(torch.float8_e4m3fn).contiguous().T
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(
        left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
