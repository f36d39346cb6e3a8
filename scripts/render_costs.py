#!/usr/bin/env python
"""Writes the table of kernels/README.md: bytes, FLOPs and expected time of every operation.

python scripts/render_costs.py
"""

import re
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "kernels")]

from mmalign_kernels import costs  # noqa: E402
from mmalign_kernels.costs import Cost  # noqa: E402

README = REPOSITORY / "kernels/README.md"
COPY = 3.0e12  # bytes a second, measured on an H100
PRODUCTS = 700e12  # FLOP a second that large bf16 products sustain there
T, HIDDEN, FFN, VOCAB, HEADS, HEAD_DIM, BF16 = 16384, 4096, 11008, 32000, 32, 128, 2
SUPERVISED, IMAGE_ROWS, VISION, PARAMETERS = 7168, 54 * 256, 1024, 6_738_415_616
CLIP = 64, 257, 1024, 16  # images, tokens of one, hidden size, heads
LENGTHS = [300 + 600 * i // 26 for i in range(27)]
CU_SEQLENS = list(accumulate([*LENGTHS, T - sum(LENGTHS)], initial=0))


@dataclass(frozen=True)
class Row:
    operation: str
    cost: Cost
    seconds: float  # expected
    best: str  # what the best library does

    def cells(self) -> list[str]:
        cost, seconds = self.cost, self.seconds
        by_products = cost.flops > 100 * cost.bytes  # 300 are the balance of an H100
        rate = cost.flops / seconds / 1e12 if by_products else cost.bytes / seconds / 1e9
        return [
            self.operation,
            *(_three_digits(x / 1e6) for x in (cost.bytes, cost.moved_bytes)),
            *(_three_digits(x / 1e9) for x in (cost.flops, cost.done_flops)),
            f"{seconds * 1e3:.3g}",
            f"{rate:.0f} TFLOP/s" if by_products else f"{rate:.0f} GB/s",
            self.best,
        ]


def memory(operation: str, cost: Cost, best: str = "", share: float = 0.90) -> Row:
    """Bound by the copy bandwidth: the bytes that the kernels move, at a share of it."""
    return Row(operation, cost, cost.moved_bytes / (share * COPY), best)


def _three_digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def norms() -> list[Row]:
    size = T, HIDDEN, BF16
    both = costs.add_rms_norm_backward
    return [
        memory("rms_norm", costs.rms_norm_forward(*size), "QuACK and Liger 2.90 TB/s"),
        memory(
            "rms_norm backward",
            costs.rms_norm_backward(*size),
            "torch 0.62 TB/s, Liger 0.33 (at 4,096 rows)",
        ),
        memory("add_rms_norm", costs.add_rms_norm_forward(*size), "Liger 2.92 TB/s (fp32)"),
        memory("add_rms_norm backward", both(*size), "Liger 1.79 TB/s (fp32)"),
        memory("add_rms_norm backward, frozen", both(*size, False), "no library skips dweight"),
    ]


def elementwise() -> list[Row]:
    images, tokens, hidden_size, _ = CLIP
    clip, columns = (images * tokens, hidden_size, BF16), 4 * hidden_size
    forward, backward = costs.swiglu_forward, costs.swiglu_backward
    return [
        memory("swiglu", forward(T, FFN, BF16), "Liger 3.02 TB/s"),
        memory("swiglu backward", backward(T, FFN, BF16), "Liger, both directions, 2.21 TB/s"),
        memory("pack_rows", costs.pack_rows_forward(T, HIDDEN, BF16)),
        memory("pack_rows backward", costs.pack_rows_backward(T, T, HIDDEN, BF16), share=0.8),
        memory("unpack_rows", costs.unpack_rows_forward(T // 2, T, HIDDEN, BF16)),
        memory("unpack_rows backward", costs.unpack_rows_backward(T // 2, HIDDEN, BF16)),
        memory("layer_norm, CLIP", costs.layer_norm_forward(*clip)),
        memory("layer_norm backward, CLIP", costs.layer_norm_backward(*clip)),
        memory("quick_gelu, CLIP", costs.quick_gelu_forward(clip[0] * columns, BF16)),
        memory("quick_gelu backward, CLIP", costs.quick_gelu_backward(clip[0] * columns, BF16)),
    ]


def attention() -> list[Row]:
    images, tokens, _, heads = CLIP
    size = CU_SEQLENS, HEADS, HEADS, HEAD_DIM, BF16
    clip = list(range(0, images * tokens + 1, tokens)), heads, 64, BF16

    def row(operation: str, cost: Cost, tflops: float, best: str) -> Row:
        return Row(operation, cost, cost.flops / (tflops * 1e12), best)

    return [
        row(
            "rotary_attention",
            costs.rotary_attention_forward(*size),
            250,
            "FlashAttention-2 190 to 260 TFLOP/s, -3 290 to 420, without rotation",
        ),
        row(
            "rotary_attention backward",
            costs.rotary_attention_backward(*size),
            170,
            "FlashAttention-2 210 to 260 TFLOP/s, -3 320 to 420 (not causal)",
        ),
        row(
            "full_attention, CLIP",
            costs.full_attention_forward(*clip),
            200,
            "FlashAttention-2 280 TFLOP/s, -3 330",
        ),
        row("full_attention backward, CLIP", costs.full_attention_backward(*clip), 110, ""),
        memory("prefix_attention", branches(), "prefixes again for every branch", share=0.80),
    ]


def branches() -> Cost:
    """256 segments of 32 tokens; 8 follow each of 32 cached prefixes of 160 tokens."""
    length, prefix, num_segments = 32, 160, 256
    own = 32 * prefix  # the cache's first row of what this call adds
    begins, ends = [], []
    for i in range(num_segments):
        begins += [i // 8 * prefix, own + i * length]
        ends += [(i // 8 + 1) * prefix, own + (i + 1) * length]
    cu_seqlens = list(range(0, (num_segments + 1) * length, length))
    cu_spans = list(range(0, 2 * num_segments + 1, 2))
    size = HEADS, HEADS, HEAD_DIM, BF16
    return costs.prefix_attention_forward(cu_seqlens, begins, ends, cu_spans, *size)


def products() -> list[Row]:
    rows = IMAGE_ROWS, VISION, T, HIDDEN, BF16
    forward, backward = (
        costs.project_image_features_forward(*rows),
        costs.project_image_features_backward(*rows, needs_hidden=False),
    )
    product = forward.flops / 650e12
    second_step = (3 * T - IMAGE_ROWS) * HIDDEN * BF16 / (0.9 * COPY)
    walk = 4 * IMAGE_ROWS * HIDDEN * BF16 / (0.9 * COPY)
    scored = costs.target_logprobs_forward(T // 2, T, HIDDEN, VOCAB, BF16)
    return [
        Row("project_image_features", forward, product + second_step, "none fuses the scatter"),
        Row("project_image_features backward, stage 1", backward, product + walk, ""),
        *losses(),
        Row("target_logprobs", scored, 1.08 * scored.flops / PRODUCTS, "whole log-softmax"),
    ]


def losses() -> list[Row]:
    size, rows = (T, SUPERVISED, HIDDEN, VOCAB, BF16), []
    for name, needs, best in (
        ("no gradient", (False, False), ""),
        ("forward and backward, frozen", (True, False), ""),
        ("forward and backward", (True, True), "QuACK 760 TFLOP/s, Liger in Triton 160"),
    ):
        loss = costs.linear_cross_entropy_forward(*size, *needs)
        cost = loss
        if any(needs):
            cost += costs.linear_cross_entropy_backward(*size, *needs)
        scaling = (cost.moved_bytes - loss.moved_bytes) / (0.9 * COPY)
        seconds = 1.175 * loss.done_flops / PRODUCTS + scaling
        rows.append(Row(f"linear_cross_entropy, {name}", cost, seconds, best))
    return rows


def optimizer() -> list[Row]:
    name = "adamw_step, 6.74 B parameters"
    stochastic = costs.adamw_step(PARAMETERS, "stochastic")
    return [
        memory(f"{name}, split master", costs.adamw_step(PARAMETERS, "split"), "apex", 0.87),
        memory(f"{name}, random rounding", stochastic, "torchao, not in one pass", 0.84),
        memory(f"{name}, fp32", costs.adamw_step(PARAMETERS, "fp32"), "torch fused, apex"),
    ]


HEAD = ("operation", "MB", "moved", "GFLOP", "done", "ms", "rate", "best library")


def table() -> str:
    rows = [*norms(), *elementwise(), *attention(), *products(), *optimizer()]
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rendered(text: str) -> str:
    """The text of kernels/README.md with a fresh table."""
    return re.sub(r"(?ms)^\| operation .*?\n(?!\|)", lambda _: table() + "\n", text)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
