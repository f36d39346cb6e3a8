"""Runs every kernel of csrc/ once on small cases, for compute-sanitizer:

    compute-sanitizer --tool racecheck python -m tests.csrc.sanitize

Needs a GPU and the built library. A case is small, but has several blocks, a ragged end and more
than one tile for a persistent block to walk through.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from mmalign_kernels.cuda import adamw as adamw_cuda
from mmalign_kernels.cuda import projector as projector_cuda
from mmalign_kernels.cuda import rms_norm as rms_norm_cuda
from mmalign_kernels.cuda import rotary_attention as rotary_attention_cuda

DEVICE = "cuda"  # test_sanitize.py runs the cases elsewhere
Case = tuple[str, Callable[[], object]]
ROWS = 37
COLUMNS = (8, 1024, 3200, 17)  # several rows a block; idle lanes; one row a block; any width
SIZES = (1, 5000, 4096)  # of AdamW's tensors: less than a tile, a ragged end, whole tiles
SETTINGS = (1, 1e-2, 0.9, 0.95, 1e-8, 0.1)


def rms_norm_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for columns in COLUMNS:
            x, grad = (torch.randn(ROWS, columns, dtype=dtype, device=DEVICE) for _ in range(2))
            weight = torch.randn(columns, dtype=dtype, device=DEVICE)
            _, rstd = rms_norm_cuda.rms_norm_fwd(x, weight, 1e-5)
            name = f"{dtype} {columns}"
            yield (
                f"rms_norm_fwd {name}",
                lambda x=x, w=weight: rms_norm_cuda.rms_norm_fwd(x, w, 1e-5),
            )
            yield (
                f"add_rms_norm_fwd {name}",
                lambda x=x, g=grad, w=weight: rms_norm_cuda.add_rms_norm_fwd(x, g, w, 1e-5),
            )
            for residual in (None, grad):
                for needs in (False, True):
                    arguments = (grad, residual, x, weight, rstd, needs)
                    yield (
                        f"rms_norm_bwd {name} {residual is not None} {needs}",
                        lambda arguments=arguments: rms_norm_cuda.rms_norm_bwd(*arguments),
                    )


def _state(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A moment of zeros and, for 8-bit codes, its scales."""
    scales = [torch.zeros(-(-size // 128), device=DEVICE)] if dtype == torch.uint8 else []
    return torch.zeros(size, dtype=dtype, device=DEVICE), scales


def adamw_cases() -> Iterator[Case]:
    update, scale = adamw_cuda.operation("adamw_update"), torch.tensor(0.5, device=DEVICE)
    for kind, dtype in (
        ("fp32", torch.float32),
        ("split", torch.bfloat16),
        ("rounded", torch.bfloat16),
    ):
        for grad_dtype in {dtype, torch.float32}:
            for moment in (torch.float32, torch.bfloat16, torch.uint8):
                params = [torch.randn(n, device=DEVICE).to(dtype) for n in SIZES]
                grads = [torch.randn(n, device=DEVICE).to(grad_dtype) for n in SIZES]
                remainders = [torch.zeros_like(p, dtype=torch.int16) for p in params]
                remainders = remainders if kind == "split" else []
                firsts, seconds = ([_state(n, moment) for n in SIZES] for _ in range(2))
                moments = ([x for x, _ in firsts], [x for x, _ in seconds])
                scales = ([s for _, x in firsts for s in x], [s for _, x in seconds for s in x])
                arguments = (params, grads, *moments, remainders, *scales, scale, *SETTINGS, 3)
                yield f"adamw {kind} {grad_dtype} {moment}", lambda a=arguments: update(*a)


def _is_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


def projector_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16) if _is_hopper() else ():
        for columns, features, images, tokens in (
            (512, 520, 129, 300),  # a cluster of two blocks, a ragged end of features and rows
            (4096, 64, 5, 7),  # the largest cluster, less than a tile
            (5120, 64, 3, 260),  # columns in several passes
            (256, 64, 0, 40),  # text alone
        ):
            shapes = ((images, features), (columns, features), (columns,), (tokens, columns))
            tensors = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
            positions = torch.randperm(tokens, device=DEVICE)[:images].sort().values
            norm_weight = torch.ones(columns, dtype=dtype, device=DEVICE)
            arguments = (*tensors, positions, norm_weight, 1e-5)
            yield (
                f"project_image_features_fwd {dtype} {columns} {features} {images} {tokens}",
                lambda a=arguments: projector_cuda.project_image_features_fwd(*a),
            )


def rotary_cases() -> Iterator[Case]:
    if not _is_hopper():
        return
    lengths = (1, 300, 0, 129, 128)  # ragged tiles, more tiles of keys than stages
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    position_ids = torch.cat([torch.arange(n, device=DEVICE) for n in lengths]).int()
    for dtype in (torch.bfloat16, torch.float16):
        for num_heads, num_kv, head_dim in ((4, 2, 64), (2, 2, 128)):
            columns = (num_heads + 2 * num_kv) * head_dim
            qkv = torch.randn(sum(lengths), columns, device=DEVICE).to(dtype)
            tables = [torch.rand(max(lengths), head_dim // 2, device=DEVICE) for _ in range(2)]
            for causal in (True, False):
                heads = (max(lengths), num_heads, num_kv, causal)
                arguments = (qkv, *tables, position_ids, bounds, *heads)
                results = rotary_attention_cuda.rotary_attention_fwd(*arguments)
                backward = (torch.randn_like(results[0]), qkv, *results, *arguments[1:])
                name = f"{dtype} {head_dim} {causal}"
                yield (
                    f"rotary_attention_fwd {name}",
                    lambda a=arguments: rotary_attention_cuda.rotary_attention_fwd(*a),
                )
                yield (
                    f"rotary_attention_bwd {name}",
                    lambda a=backward: rotary_attention_cuda.rotary_attention_bwd(*a),
                )


def cases() -> Iterator[Case]:
    for family in (rms_norm_cases, adamw_cases, projector_cases, rotary_cases):
        yield from family()


def main() -> None:
    torch.manual_seed(0)
    number, failed = 0, []
    for name, run in cases():
        number += 1
        print(name, flush=True)
        try:
            run()
            torch.cuda.synchronize()
        except RuntimeError as error:  # the other cases still run
            failed.append(f"{name}: {error}")
    print(f"{number} calls, {len(failed)} failed")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
