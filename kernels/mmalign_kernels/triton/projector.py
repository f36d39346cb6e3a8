"""Projector and first RMSNorm in Triton: product, scatter and norm in two launches.

    new_hidden[position of i] = image_features[i] @ weight^T + bias; other rows as they come in
    normed = new_hidden * rstd * norm_weight, rstd = 1 / sqrt(mean(new_hidden^2) + eps)

1. project  a program owns a 128 x 256 tile of the product; its epilogue adds the bias and writes
            each row at its packed position. A tile holds 256 of a row's 4,096 columns.
2. norm     a program owns a row: it reads text rows from hidden_states (and copies them), image
            rows from the output of step 1, and writes the normalised row and rstd.

The row statistics need the second step. To normalise in step 1, 16 programs would have to combine
128 rows: through a counter in memory, the last one reading the other 15 tiles again (from L2; step
2 does that with more programs), or through the shared memory of a cluster, which Triton cannot do.
Step 2 must process the text rows anyway, reads each row once, and starts with the rows written
last, which L2 still holds. Its extra cost is reading the image rows, from HBM at worst: 57 MB for
27 images of 256 rows.

Bytes, T rows of H, M of them image rows of D features, bf16: step 1 reads 2MD + 2DH, writes 2MH;
step 2 reads 2TH, writes 2TH and 2(T - M)H. H = 4096, D = 1024, M = 6,912, T = 8,192: 58 GFLOP with
79 MB, then 145 MB.

Backward: persistent programs loop over the rows (only image rows if nothing else is trained),
compute dx as RMSNorm's backward does, write text rows to the gradient of hidden_states and image
rows to a contiguous buffer of M rows, and accumulate dbias and dnorm_weight in registers: one
partial row per program, summed in a fixed order. dweight is cuBLAS's product of that buffer with
image_features, since the host knows M. Reads 6TH and writes 2TH + 2MH bytes; if only weight and
bias are trained, 6MH and 2MH.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import empty_statistics
from . import launch
from .common import column_sum, upcast
from .matmul import (
    load_tile,
    operand,
    place_of_tile,
    takes_descriptors,
)


@triton.jit(do_not_specialize=["num_rows"])
def _project_kernel(
    features,  # (num_rows, FEATURES)
    weight,  # (COLUMNS, FEATURES)
    bias_ptr,  # (COLUMNS,)
    positions_ptr,  # (num_rows,)
    hidden_ptr,  # (total_tokens, COLUMNS)
    is_image_ptr,  # (total_tokens,) zeros; set to 1 for the rows written
    num_rows,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    num_m = tl.cdiv(num_rows, BLOCK_M)
    num_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    step = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), num_m * num_n, step, flatten=True):
        m, n = place_of_tile(tile, num_m, num_n)
        total = upcast(tl.zeros((BLOCK_M, BLOCK_N), hidden_ptr.dtype.element_ty))
        for k in range(0, FEATURES, BLOCK_K):
            x = load_tile(
                features,
                m * BLOCK_M,
                k,
                num_rows,
                FEATURES,
                FEATURES,
                BLOCK_M,
                BLOCK_K,
                DESCRIPTORS,
            )
            w = load_tile(
                weight, n * BLOCK_N, k, COLUMNS, FEATURES, FEATURES, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            total = tl.dot(x, w.T, total, input_precision="ieee", out_dtype=total.dtype)
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)
        total += upcast(tl.load(bias_ptr + column, mask=column < COLUMNS, other=0.0))[None, :]
        inside = row < num_rows
        to = tl.load(positions_ptr + row, mask=inside, other=0).to(tl.int64)
        tl.store(is_image_ptr + to, tl.full((BLOCK_M,), 1, tl.int8), mask=inside & (n == 0))
        inside = inside[:, None] & (column < COLUMNS)[None, :]
        place = hidden_ptr + to[:, None] * COLUMNS + column[None, :]
        tl.store(place, total.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    text_ptr,  # (num_rows, COLUMNS): its text rows are read
    hidden_ptr,  # (num_rows, COLUMNS): image rows are read, others written
    is_image_ptr,  # (num_rows,)
    weight_ptr,  # (COLUMNS,)
    normed_ptr,  # (num_rows, COLUMNS)
    rstd_ptr,  # (num_rows,)
    num_rows,
    eps,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = (
        tl.num_programs(0) - 1 - tl.program_id(0)
    ) * ROWS  # the last rows written are still in L2
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None]
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)
    is_image = tl.load(is_image_ptr + rows, rows < num_rows, other=0)[:, None] != 0
    at = rows.to(tl.int64)[:, None] * COLUMNS + columns  # (ROWS, BLOCK)
    text = tl.load(text_ptr + at, inside & ~is_image, other=0)
    image = tl.load(hidden_ptr + at, inside & is_image, other=0)
    tl.store(hidden_ptr + at, text, inside & ~is_image)
    x = upcast(tl.where(is_image, image, text))
    rstd = tl.rsqrt(tl.sum(x * x, 1) / COLUMNS + eps)
    weight = upcast(tl.load(weight_ptr + columns, columns < COLUMNS, other=0))
    tl.store(normed_ptr + at, (x * rstd[:, None] * weight).to(normed_ptr.dtype.element_ty), inside)
    tl.store(rstd_ptr + rows, rstd, rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _image_of_row_kernel(
    positions_ptr,  # (num_rows,)
    image_of_row_ptr,  # (total_tokens,) int32
    num_rows,
    BLOCK: tl.constexpr,
):
    """The index among the image rows for every image row; others are left unchanged."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    to = tl.load(positions_ptr + i, i < num_rows, other=0)
    tl.store(image_of_row_ptr + to, i, i < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _rows_gradient_kernel(
    grad_normed_ptr,  # (total_tokens, COLUMNS) or None
    grad_new_ptr,  # (total_tokens, COLUMNS) or None: gradient of new_hidden
    hidden_ptr,  # (total_tokens, COLUMNS)
    weight_ptr,  # (COLUMNS,): of the norm
    rstd_ptr,  # (total_tokens,)
    positions_ptr,  # (num_rows,) or None: rows to process; None: all
    image_of_row_ptr,  # (total_tokens,) or None: row i of positions is image row i
    grad_image_ptr,  # (number of image rows, COLUMNS) or None
    grad_hidden_ptr,  # (total_tokens, COLUMNS) or None: zeros at image rows
    partial_bias_ptr,  # (num_programs, COLUMNS) or None
    partial_norm_ptr,  # (num_programs, COLUMNS) or None
    num_rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)[None]
    weight = upcast(tl.load(weight_ptr + columns, columns < COLUMNS, other=0))
    sum_bias = tl.zeros((ROWS, BLOCK), weight.dtype)
    sum_norm = tl.zeros((ROWS, BLOCK), weight.dtype)
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        image = tile * ROWS + tl.arange(0, ROWS)
        row = image
        is_row = image < num_rows
        if positions_ptr is not None:
            row = tl.load(positions_ptr + image, is_row, other=0)
        else:
            image = tl.load(image_of_row_ptr + row, is_row, other=-1)
        is_image = (is_row & (image >= 0))[:, None] & (columns < COLUMNS)
        inside = is_row[:, None] & (columns < COLUMNS)
        at = row.to(tl.int64)[:, None] * COLUMNS + columns  # (ROWS, BLOCK)
        grad = tl.zeros((ROWS, BLOCK), weight.dtype)
        if grad_normed_ptr is not None:
            grad_normed = upcast(tl.load(grad_normed_ptr + at, inside, other=0))
            rstd = tl.load(rstd_ptr + row, is_row, other=0)[:, None]
            normed = upcast(tl.load(hidden_ptr + at, inside, other=0)) * rstd
            if partial_norm_ptr is not None:
                sum_norm += grad_normed * normed
            grad_normed *= weight
            along = tl.sum(grad_normed * normed, 1)[:, None] / COLUMNS
            grad = (grad_normed - normed * along) * rstd
        if grad_new_ptr is not None:
            grad += upcast(tl.load(grad_new_ptr + at, inside, other=0))
        if partial_bias_ptr is not None:
            sum_bias += tl.where(is_image, grad, 0)
        if grad_image_ptr is not None:
            to = grad_image_ptr + image.to(tl.int64)[:, None] * COLUMNS + columns
            tl.store(to, grad.to(grad_image_ptr.dtype.element_ty), is_image)
        if grad_hidden_ptr is not None:
            grad = tl.where(is_image, 0, grad).to(grad_hidden_ptr.dtype.element_ty)
            tl.store(grad_hidden_ptr + at, grad, inside)
    at = tl.program_id(0) * COLUMNS + columns
    if partial_bias_ptr is not None:
        tl.store(partial_bias_ptr + at, tl.sum(sum_bias, 0)[None], columns < COLUMNS)
    if partial_norm_ptr is not None:
        tl.store(partial_norm_ptr + at, tl.sum(sum_norm, 0)[None], columns < COLUMNS)


def project_image_features_fwd(
    image_features: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden_states: Tensor,
    image_positions: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_states, norm_weight = hidden_states.contiguous(), norm_weight.contiguous()
    num_rows, columns = hidden_states.shape
    new_hidden, normed = (hidden_states.new_empty(hidden_states.shape) for _ in range(2))
    rstd = empty_statistics(hidden_states)
    is_image = hidden_states.new_zeros(num_rows, dtype=torch.int8)
    if len(image_features):
        _project(image_features, weight, bias, image_positions, new_hidden, is_image)
    rows, block, num_warps = launch.row_tile(hidden_states)
    if num_rows:
        _norm_kernel[(launch.ceil_div(num_rows, rows),)](
            hidden_states, new_hidden, is_image, norm_weight, normed, rstd, num_rows, eps,
            COLUMNS=columns, ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return new_hidden, normed, rstd


def _project(
    image_features: Tensor,
    weight: Tensor,
    bias: Tensor,
    image_positions: Tensor,
    new_hidden: Tensor,
    is_image: Tensor,
) -> None:
    image_features, weight = image_features.contiguous(), weight.contiguous()
    tile, descriptors = launch.tile_settings(weight), takes_descriptors(image_features, weight)
    (num_rows, num_features), columns = image_features.shape, new_hidden.shape[1]
    tiles = launch.ceil_div(num_rows, tile.m) * launch.ceil_div(columns, tile.n)
    _project_kernel[(min(tiles, launch.gpu(weight).num_multiprocessors),)](
        operand(image_features, tile.m, tile.k, descriptors),
        operand(weight, tile.n, tile.k, descriptors),
        bias.contiguous(), image_positions.contiguous(), new_hidden, is_image, num_rows,
        COLUMNS=columns, FEATURES=num_features, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        DESCRIPTORS=descriptors, **tile.launch_options,
    )  # fmt: skip


def project_image_features_bwd(
    image_features: Tensor,
    weight: Tensor,
    hidden_states: Tensor,
    image_positions: Tensor,
    norm_weight: Tensor,
    rstd: Tensor,
    grad_hidden: Tensor | None,
    grad_normed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_features, needs_weight, needs_bias, needs_hidden, needs_norm = needs
    num_images, columns = len(image_features), len(weight)
    grad_image = weight.new_empty(num_images, columns) if needs_features or needs_weight else None
    grad_text = weight.new_empty(hidden_states.shape) if needs_hidden else None
    partial_bias, partial_norm = _rows_gradient(
        grad_normed, grad_hidden, hidden_states, norm_weight, rstd, image_positions,
        grad_image, grad_text, needs_bias, needs_norm,
    )  # fmt: skip
    return (
        torch.mm(grad_image, weight) if needs_features else weight.new_empty(0),
        torch.mm(grad_image.t(), image_features) if needs_weight else weight.new_empty(0),
        column_sum(partial_bias, weight.dtype) if needs_bias else weight.new_empty(0),
        grad_text if needs_hidden else weight.new_empty(0),
        column_sum(partial_norm, weight.dtype) if needs_norm else weight.new_empty(0),
    )


def _rows_gradient(
    grad_normed: Tensor | None,
    grad_new: Tensor | None,
    hidden_states: Tensor,
    norm_weight: Tensor,
    rstd: Tensor,
    positions: Tensor,
    grad_image: Tensor | None,
    grad_text: Tensor | None,
    needs_bias: bool,
    needs_norm: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes grad_image and grad_text; returns partial sums of the gradients of bias and norm."""
    everywhere = grad_text is not None or needs_norm  # otherwise only image rows are needed
    num_rows, columns = len(hidden_states) if everywhere else len(positions), hidden_states.shape[1]
    rows, block, num_warps = launch.row_tile(hidden_states)
    programs = launch.persistent(hidden_states, launch.ceil_div(num_rows, rows), num_warps)
    partial_bias = rstd.new_empty(programs, columns) if needs_bias else None
    partial_norm = rstd.new_empty(programs, columns) if needs_norm else None
    grads = [x if x is None else x.contiguous() for x in (grad_normed, grad_new)]
    image_of_row = _image_of_row(positions, num_rows) if everywhere else None
    num_read = 2 * (grad_normed is not None) + (grad_new is not None)
    if programs:
        _rows_gradient_kernel[(programs,)](
            *grads, hidden_states, norm_weight.contiguous(), rstd,
            None if everywhere else positions.contiguous(), image_of_row, grad_image, grad_text,
            partial_bias, partial_norm, num_rows, COLUMNS=columns, ROWS=rows, BLOCK=block,
            STAGES=launch.stages(hidden_states, num_read), num_warps=num_warps,
        )  # fmt: skip
    return partial_bias, partial_norm


def _image_of_row(positions: Tensor, num_rows: int) -> Tensor:
    image_of_row = positions.new_full((num_rows,), -1, dtype=torch.int32)
    if len(positions):
        block = 1024
        _image_of_row_kernel[(launch.ceil_div(len(positions), block),)](
            positions.contiguous(), image_of_row, len(positions), block
        )
    return image_of_row
