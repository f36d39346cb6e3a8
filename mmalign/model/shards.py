"""Parameters sharded by FSDP2: the local shard, or the gathered (unsharded) parameter."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds of a sharded tensor (a view), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def unsharded(*modules: nn.Module) -> Iterator[None]:
    """Inside, these modules' own shards are gathered into plain parameters, on every process.

    All processes have to enter together. The gathered memory is freed afterwards: copy first.
    """
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def fsdp_unit_of(module: nn.Module, parameter: str) -> nn.Module:
    """The FSDP unit that holds this parameter: the innermost such module, else `module` itself.

    parameter: a dotted name, as named_parameters of `module` gives it.
    """
    unit = owner = module
    for name in parameter.split(".")[:-1]:
        owner = owner.get_submodule(name)
        if isinstance(owner, FSDPModule):
            unit = owner
    return unit
