"""Bytes and FLOPs of the operations that multiply by a weight."""

from ..triton.launch import HOPPER_TILE, LOGITS_PER_CHUNK, TILES_PER_GROUP, ceil_div
from .cost import Cost, Passes, partial_rows

_GROUP_ROWS = HOPPER_TILE.m * TILES_PER_GROUP


def project_image_features(
    image_rows: int,
    vision_size: int,
    tokens: int,
    hidden_size: int,
    itemsize: int,
    needs_hidden: bool = True,
) -> Passes:
    """image_rows of the tokens come from the product, the others from hidden_states.

    Backward: weight and bias; needs_hidden: hidden_states and the norm's weight, too.
    """
    flops = 2 * image_rows * vision_size * hidden_size
    operands = image_rows * vision_size + (vision_size + 2) * hidden_size
    text, numel = (tokens - image_rows) * hidden_size, tokens * hidden_size
    required = (operands + text + 2 * numel) * itemsize + 8 * image_rows
    # the image rows are read again to be normed; one byte per row marks them
    extra = image_rows * hidden_size * itemsize + 4 * tokens + 2 * tokens + image_rows
    forward = Cost(required, flops, required + extra, flops)
    rows = tokens if needs_hidden else image_rows
    image, numel = image_rows * hidden_size, rows * hidden_size
    result = vision_size * hidden_size + hidden_size + (numel + hidden_size) * needs_hidden
    required = (3 * numel + hidden_size + image_rows * vision_size + result) * itemsize
    required += 8 * image_rows
    partial = (1 + needs_hidden) * partial_rows(rows, hidden_size, itemsize)
    indices = (8 * rows + 4 * image_rows) * needs_hidden
    extra = 2 * image * itemsize + partial + 4 * rows + indices
    return Passes(forward, Cost(required, flops, required + extra, flops))


# language-model head


def linear_cross_entropy(
    tokens: int,
    supervised: int,
    hidden_size: int,
    vocab_size: int,
    itemsize: int,
    needs_hidden: bool = True,
    needs_weight: bool = True,
) -> Passes:
    """Required of the forward pass is the loss alone; but the kernels compute the needed gradients
    in it, and the backward pass only scales them.
    """
    product, numel = 2 * supervised * hidden_size * vocab_size, tokens * hidden_size
    rows, weight = supervised * hidden_size * itemsize, vocab_size * hidden_size * itemsize
    chunks, groups = _chunks(supervised, vocab_size), _groups(supervised, vocab_size)
    logits, statistics = supervised * vocab_size * itemsize, _statistics(supervised, vocab_size)
    moved = 16 * tokens + 3 * rows  # targets twice; rows, the targets' weights, a copy
    moved += rows + groups * weight + 2 * statistics  # their product
    if needs_hidden or needs_weight:
        moved += 3 * logits + statistics
    if needs_hidden:
        ignored = (tokens - supervised) * hidden_size * itemsize
        moved += logits + groups * weight + rows + ignored
    if needs_weight:
        sums = 4 * vocab_size * hidden_size
        moved += logits + rows + (2 * chunks - 1) * sums
    done = product * (1 + needs_hidden + needs_weight)
    forward = Cost(rows + weight + 8 * tokens, product, moved, done)
    required = rows + weight + (numel * itemsize) * needs_hidden + weight * needs_weight
    moved = 2 * numel * itemsize * needs_hidden
    moved += vocab_size * hidden_size * (4 + itemsize) * needs_weight
    return Passes(forward, Cost(required, (needs_hidden + needs_weight) * product, moved, 0))


def target_logprobs(
    num_rows: int, num_targets: int, hidden_size: int, vocab_size: int, itemsize: int
) -> Cost:
    """num_rows: distinct rows that targets name."""
    product = 2 * num_rows * hidden_size * vocab_size
    rows, weight = num_rows * hidden_size * itemsize, vocab_size * hidden_size * itemsize
    required = rows + weight + 20 * num_targets
    statistics = _statistics(num_rows, vocab_size)
    groups = ceil_div(num_rows, _GROUP_ROWS)
    moved = 3 * rows + groups * weight + 20 * num_rows
    moved += statistics + num_targets * (2 * hidden_size * itemsize + 24)
    moved += ceil_div(vocab_size, HOPPER_TILE.n) * 8 * num_targets
    return Cost(required, product, moved, product)


def _chunk_rows(vocab_size: int) -> int:
    return max(LOGITS_PER_CHUNK // vocab_size // HOPPER_TILE.m, 1) * HOPPER_TILE.m


def _chunks(supervised: int, vocab_size: int) -> int:
    return max(ceil_div(supervised, _chunk_rows(vocab_size)), 1)


def _groups(rows: int, vocab_size: int) -> int:
    """How often a product of these rows streams the weight: tiles in flight share it."""
    full, rest = divmod(rows, _chunk_rows(vocab_size))
    return full * ceil_div(_chunk_rows(vocab_size), _GROUP_ROWS) + ceil_div(rest, _GROUP_ROWS)


def _statistics(rows: int, vocab_size: int) -> int:
    """Largest logit and sum of every row's tiles, fp32."""
    return 8 * rows * ceil_div(vocab_size, HOPPER_TILE.n)
