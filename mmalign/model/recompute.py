"""Activations that the backward pass computes again instead of keeping them.

    none         every operation keeps what it needs
    elementwise  the results of RMSNorm and SwiGLU: no matrix product runs twice
    mlp          these, and gate_up_proj: a sixth more work in the layer, about half its memory
    full         the whole layer but its input: a third more work

Frozen weights keep no inputs of their products and adapters keep copies with dropout, so
elementwise saves memory where the decoder's own weights learn, and where LoRA has no dropout. What
is computed again are the same numbers, LoRA's dropout included.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mmalign.errors import UserError

if TYPE_CHECKING:
    from mmalign.model.decoder import Decoder

Recompute = Literal["none", "elementwise", "mlp", "full"]
POLICIES: tuple[Recompute, ...] = get_args(Recompute)  # in the order of what they compute again


def set_recompute(decoder: "Decoder", policy: Recompute, num_layers: int | None = None) -> None:
    """The policy of the first num_layers layers, None: of all; the others keep everything."""
    assert policy in POLICIES, policy  # "auto" is decided by the memory plan
    for layer, chosen in zip(
        decoder.layers, policy_by_layer(policy, num_layers, len(decoder.layers)), strict=True
    ):
        layer.recompute = chosen


def policy_by_layer(
    policy: Recompute, num_layers: int | None, total_layers: int
) -> list[Recompute]:
    """One of each layer. Raises UserError for more layers than there are."""
    if num_layers is None:
        num_layers = total_layers
    if not 0 <= num_layers <= total_layers:
        raise UserError(
            f"--recompute-layers {num_layers}: this decoder has {total_layers} layers. Give 0 to "
            f"{total_layers}"
        )
    return [policy] * num_layers + ["none"] * (total_layers - num_layers)


@contextmanager
def kept_as(result: Tensor, source: Tensor, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, an operation that keeps `result` keeps `source` instead.

    compute(source) gives the result's values again. Raises RuntimeError in the backward pass where
    source has been overwritten in between.
    """
    source = source.detach()
    version = source._version

    def pack(x: Tensor) -> Any:
        same = x.data_ptr() == result.data_ptr() and x.shape == result.shape
        return compute if same and x.stride() == result.stride() else x

    def unpack(kept: Any) -> Tensor:
        if kept is not compute:
            return kept
        if source._version != version:
            raise RuntimeError(
                "an activation is computed again from one that has been overwritten since: a "
                "second backward pass through the same graph needs recompute none"
            )
        with torch.no_grad():
            return compute(source)

    with saved_tensors_hooks(pack, unpack):
        yield


def run_again(
    run: Callable[[Tensor], Any],
    normed: Tensor,
    residual: Tensor,
    norm: Callable[[Tensor], Tensor],
    draws: bool,
) -> Any:
    """run(normed), of which the backward pass keeps residual alone, where normed = norm(residual).

    Everything else that run keeps is computed again when the backward pass reaches it. draws:
    whether run draws random numbers, which then are the same again.
    """
    given = [normed]  # let go of after the first call
    needs_gradient = normed.requires_grad

    def region(residual: Tensor) -> Any:
        if given:
            return run(given.pop())
        with torch.no_grad():
            again = norm(residual)
        return run(again.requires_grad_(needs_gradient))

    return checkpoint(region, residual, use_reentrant=False, preserve_rng_state=draws)
