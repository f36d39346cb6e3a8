"""Activation checkpointing: what the backward pass computes again instead of keeping it.

    none         every operation keeps what it needs
    elementwise  the results of RMSNorm and SwiGLU: no matrix product runs twice
    mlp          these, and gate_up_proj: a sixth more work in the layer, about half its memory
    full         the whole layer except its input: a third more work

Products with frozen weights keep no inputs, and adapters with dropout keep copies, so elementwise
saves memory where the decoder's own weights learn, or where LoRA has no dropout. Recomputed values
are the same bits, LoRA's dropout included.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mmalign.config import Recompute
from mmalign.errors import UserError

POLICIES: tuple[Recompute, ...] = get_args(Recompute)  # in the order of what they compute again


def policy_by_layer(
    policy: Recompute, num_layers: int | None, total_layers: int
) -> list[Recompute]:
    """The policy of each layer: the first num_layers (None: all) recompute, the others do not.

    Raises UserError for more layers than there are.
    """
    if num_layers is None:
        num_layers = total_layers
    if not 0 <= num_layers <= total_layers:
        raise UserError(
            f"--recompute-layers {num_layers}: this decoder has {total_layers} layers. Give 0 to "
            f"{total_layers}"
        )
    return [policy if i < num_layers else "none" for i in range(total_layers)]


@contextmanager
def save_source_instead(
    result: Tensor, source: Tensor, compute: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Inside, an operation that saves `result` for its backward pass saves `source` instead.

    compute(source) gives the result's values again. Raises RuntimeError in the backward pass where
    source has been overwritten in between.
    """
    source = source.detach()
    version = source._version

    def pack(x: Tensor) -> Any:
        same = x.data_ptr() == result.data_ptr() and x.shape == result.shape
        return compute if same and x.stride() == result.stride() else x

    def unpack(saved: Any) -> Tensor:
        if saved is not compute:
            return saved
        if source._version != version:
            raise RuntimeError(
                "an activation is computed again from one that has been overwritten since: a "
                "second backward pass through the same graph needs recompute none"
            )
        with torch.no_grad():
            return compute(source)

    with saved_tensors_hooks(pack, unpack):
        yield


def checkpoint_from_residual(
    run: Callable[[Tensor], Any],
    normed: Tensor,
    residual: Tensor,
    norm: Callable[[Tensor], Tensor],
    preserve_rng_state: bool,
) -> Any:
    """run(normed) as torch.utils.checkpoint does it, saving residual; normed = norm(residual).

    The backward pass computes the norm and everything inside run again. preserve_rng_state: run
    draws random numbers, which are then the same again.
    """
    first_input = [normed]  # released after the first call
    needs_gradient = normed.requires_grad

    def region(residual: Tensor) -> Any:
        if first_input:
            return run(first_input.pop())
        with torch.no_grad():
            again = norm(residual)
        return run(again.requires_grad_(needs_gradient))

    return checkpoint(region, residual, use_reentrant=False, preserve_rng_state=preserve_rng_state)
