"""What a GPU should reach, written down before one has run this code: bench/predictions.json.

    python -m bench.predict            # writes it
    python -m bench.predict --check    # exits with 1 where it is not current

A prediction is work over rate. The work: bytes and FLOPs that the operation requires
(mmalign_kernels.costs, mmalign.flops). The rate: what cards of this kind copy and multiply, times
the share that the kernel is expected to reach. The shares come from reading the machine code, not
from a measurement: vectorised, pipelined passes over memory 0.80 to 0.92 of a copy, the
head's products 0.75 to 0.80 of a large cuBLAS product, attention on samples of 300 to 900 tokens
0.26 forward and 0.16 backward (one program per multiprocessor, masked diagonal tiles, seven
products instead of five in the backward pass). The verdict names what misses its prediction.
"""

import json
import os
import sys

os.environ.setdefault("MMALIGN_BENCH_DEVICE", "cuda")  # the rows of a GPU, on any machine

from mmalign_kernels import costs

from bench.bench_scoring import Scoring
from bench.bench_train_step import RecipeStep
from bench.comparison import COPY, Comparison
from bench.gpu_work import operations, programs
from bench.models import LLAMA2_7B, NUM_IMAGE_TOKENS
from bench.samples import draw_samples
from bench.verdict import PREDICTIONS, scoring_title, title_of
from mmalign.config import ShortcutConfig, TrainConfig
from mmalign.data.packing import micro_batches
from mmalign.flops import Workload, forward_flops, required_flops
from mmalign.recipes import RECIPES

CARDS = {  # by the names of mmalign.system.GPUS: bytes per second of a copy, FLOP/s of a product
    "h100-80g": (3.0e12, 790e12),
    "h200": (4.3e12, 790e12),
}
SHARES = {  # of the copy or of the product, by operation: forward, backward
    "rms_norm": (0.90, 0.82),
    "add_rms_norm": (0.90, 0.82),
    "layer_norm": (0.85, 0.80),
    "swiglu": (0.90, 0.88),
    "quick_gelu": (0.88, 0.85),
    "pack_rows": (0.85, 0.70),
    "unpack_rows": (0.80, 0.85),
    "project_image_features": (0.75, 0.70),
    "rotary_attention": (0.26, 0.16),
    "full_attention": (0.35, 0.22),
    "shared_prefix_attention": (0.22, 0.14),
    "prefix_attention": (0.11, 0.11),  # 0.20 of the pairs that tiles form, 1.4 times the needed
    "linear_cross_entropy": (0.75, 0.75),
    "target_logprobs": (0.78, 0.78),
    "adamw fp32": (0.88, 0.88),
    "adamw split": (0.85, 0.85),
    "adamw stochastic": (0.85, 0.85),
}
PRODUCT, TOWER, GRADIENT_SUM = 0.93, 0.75, 0.85  # of products in a step; of sums of gradients
TREES = {  # tokens, rows that predict a target, and seconds of a CPU: tokenising and the tree
    "truthfulqa": (58_983, 44_000, 0.6),
    "ethics": (123_000, 8_100, 0.4),  # a tenth
}


def seconds_of(comparison: Comparison, card: str) -> float:
    figures = comparison.figures(comparison.variants[0], 1.0)
    share = SHARES[comparison.benchmark][comparison.direction == "backward"]
    copy, product = CARDS[card]
    if figures["bound"] == COPY:
        return figures["bytes"] / (share * copy)
    return figures["flops"] / (share * product)


def step_seconds(recipe: str, micro_batch_tokens: int, card: str) -> float:
    """A step of a 7B recipe without recomputation, on the samples that RecipeStep draws."""
    config = RECIPES[recipe][1]
    samples = draw_samples(config.stage, config.global_batch_size, LLAMA2_7B)
    workload = Workload(LLAMA2_7B.decoder, LLAMA2_7B.vision, config.stage, config.lora)
    counts = samples.num_loss_tokens, len(samples)
    flops = required_flops(workload, ShortcutConfig(), samples.lengths, *counts)
    product = CARDS[card][1]
    forward, backward = SHARES["rotary_attention"]
    seconds = flops.projections / (PRODUCT * product)
    seconds += flops.attention / product * (2 / 7 / forward + 5 / 7 / backward)
    seconds += flops.lm_head / (SHARES["linear_cross_entropy"][0] * product)
    seconds += (flops.tower + flops.tower_attention) / (TOWER * product)
    num_batches = len(micro_batches(samples.lengths, micro_batch_tokens, 1)[0])
    return seconds + _memory_seconds(config, sum(samples.lengths), num_batches, card)


def _memory_seconds(config: TrainConfig, tokens: int, num_batches: int, card: str) -> float:
    """Norms and SwiGLU of all layers, sums of gradients and AdamW."""
    decoder, copy = LLAMA2_7B.decoder, CARDS[card][0]
    trained = config.stage == "finetune"
    norms = costs.add_rms_norm(tokens, decoder.hidden_size, 2, needs_weight=trained)
    swiglu = costs.swiglu(tokens, decoder.intermediate_size, 2)
    layers = decoder.num_hidden_layers
    seconds = 0.0
    for name, passes, count in (("add_rms_norm", norms, 2 * layers), ("swiglu", swiglu, layers)):
        for cost, share in zip(passes, SHARES[name], strict=True):
            seconds += count * cost.bytes / (share * copy)
    if trained:
        vocab_size = decoder.vocab_size + NUM_IMAGE_TOKENS
        products = layers * sum(_layer_numels())  # whose gradients the products add, reading them
        others = 2 * vocab_size * decoder.hidden_size  # head and embeddings: autograd adds theirs
        seconds += (num_batches - 1) * 2 * (products + 3 * others) / (GRADIENT_SUM * copy)
        numel = products + others
        update = costs.adamw_step(numel, "stochastic", moments="bf16")
        seconds += (update.bytes + 2 * numel) / (SHARES["adamw stochastic"][0] * copy)  # and norm
    return seconds


def _layer_numels() -> list[int]:
    decoder = LLAMA2_7B.decoder
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    return [4 * hidden * hidden, 3 * hidden * inner]


def scoring_seconds(task: str, card: str) -> float:
    """Prefill of the tree's tokens, the head on its rows, and the plan."""
    num_tokens, num_rows, planning = TREES[task]
    work = forward_flops(Workload(LLAMA2_7B.decoder), [num_tokens], num_rows, 0)
    decoder, (copy, product) = LLAMA2_7B.decoder, CARDS[card]
    norms = costs.add_rms_norm(num_tokens, decoder.hidden_size, 2).forward.bytes
    swiglu = costs.swiglu(num_tokens, decoder.intermediate_size, 2).forward.bytes
    memory = decoder.num_hidden_layers * (2 * norms / 0.9 + swiglu / 0.9) / copy
    # products of tiles, latency, and the rows that go to the cache, per layer and 16,384 tokens
    attention = decoder.num_hidden_layers * 0.65e-3 * num_tokens / 16384
    products = work.projections / (PRODUCT * product)
    products += work.lm_head / (SHARES["target_logprobs"][0] * product)
    return products + memory + attention + planning


def predictions() -> dict:
    """{"seconds": {card: {title: seconds}}, "rates": {card: (bytes per second, FLOP/s)}}."""
    seconds = {}
    for card in CARDS:
        found = {title_of(one): seconds_of(one, card) for one in operations(more=None)}
        for part in ("pretrain", "finetune"):
            [step] = programs()[part]
            assert isinstance(step, RecipeStep)
            found[title_of(step)] = step_seconds(step.recipe, step.micro_batch_tokens[0], card)
        for scoring in programs()["scoring"]:
            assert isinstance(scoring, Scoring)
            found[scoring_title(scoring.task)] = scoring_seconds(scoring.task, card)
        seconds[card] = {name: float(f"{x:.3g}") for name, x in found.items()}
    return {"written by": "python -m bench.predict", "rates": CARDS, "seconds": seconds}


def main(check: bool) -> None:
    text = json.dumps(predictions(), indent=1) + "\n"
    if check:
        sys.exit(0 if PREDICTIONS.read_text() == text else f"{PREDICTIONS} is not current")
    PREDICTIONS.write_text(text)


if __name__ == "__main__":
    main("--check" in sys.argv)
