"""The model over several ranks: replicated (DDP), or sharded (FSDP2).

Sharded, each decoder layer is an FSDP unit: its weights are gathered before it computes and freed
afterwards. The root unit holds embed_tokens, norm, lm_head, the projector and the rows of
<im_start> and <im_end>; it stays gathered from the start of the forward pass to the end of the
backward pass, since the loss reads lm_head's weight outside of lm_head. Two parts are replicated
instead: the frozen vision tower (0.6 GB of a CLIP ViT-L/14 in bf16; without collectives, a rank
without an image in a micro-batch can skip it), and the layers' input norms, which the layer before
reads. The gradients of these norms are averaged here, once per step.
"""

import os
import warnings
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmalign.config import ParallelConfig, TrainConfig
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.model.llava import Llava
from mmalign.system import DTYPES


class ParallelModel:
    """`model` is what the step calls. Create it before the optimizer: parameters become shards."""

    def __init__(self, model: Llava, config: TrainConfig, ranks: DistributedContext):
        self.ranks, self.sharded = ranks, config.parallel.is_sharded(ranks.world_size)
        self.model: nn.Module = model
        if self.sharded:
            _shard(model, config, ranks)
        else:
            model.to(ranks.device)
            if ranks.world_size > 1:
                self.model = _data_parallel(model)
        self.replicated = [
            p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)
        ]

    def set_gradient_sync(self, enabled: bool) -> None:
        """Whether the next backward pass averages the gradients over the ranks.

        Once per step, after the last micro-batch: until then every rank accumulates its own.
        """
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = enabled
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(enabled)
            self.model.set_requires_all_reduce(enabled)  # between the groups of hybrid sharding

    def finish_gradients(self) -> None:
        """After the step's last backward pass: averages what FSDP2 leaves replicated."""
        if not self.sharded or not self.replicated:
            return
        gradients = [p.grad for p in self.replicated if p.grad is not None]
        flat = torch.cat([grad.flatten().float() for grad in gradients])
        self.ranks.sum(flat).div_(self.ranks.world_size)
        for grad, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            grad.copy_(mean.view_as(grad))


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Global 2-norm of gradients, shards among them; a 0-dim fp32 tensor, no host sync."""
    shards = [grad for grad in gradients if isinstance(grad, DTensor)]
    square = _square([grad for grad in gradients if not isinstance(grad, DTensor)], gradients[0])
    if shards:
        summed = _square([grad.to_local() for grad in shards], gradients[0])
        dist.all_reduce(summed, group=shards[0].device_mesh.get_group("shard"))
        square = square + summed
    return square.sqrt()


def _square(tensors: list[Tensor], like: Tensor) -> Tensor:
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), device=like.device)
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()


def _data_parallel(model: Llava) -> DistributedDataParallel:
    with warnings.catch_warnings():  # torch 2.13 renamed broadcast_buffers, 2.11 has no other name
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # the buffers are constants, which every rank has made itself
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def _mesh(config: ParallelConfig, ranks: DistributedContext) -> DeviceMesh:
    kind, world_size = ranks.device.type, ranks.world_size
    if config.sharding == "full":
        return init_device_mesh(kind, (world_size,), mesh_dim_names=("shard",))
    size = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % size:
        raise UserError(
            f"--parallel.shard-size {size} does not divide the {world_size} processes of this run. "
            "Use a divisor, or --parallel.sharding full"
        )
    shape = (world_size // size, size)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def _shard(model: Llava, config: TrainConfig, ranks: DistributedContext) -> None:
    """In place; moves one unit after the other to the device, which never holds the whole model."""
    mesh = _mesh(config.parallel, ranks)
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.precision],
        reduce_dtype=torch.float32,  # a sum over many ranks in bf16 would lose small gradients
        cast_forward_inputs=False,  # they come in the right precision, rotary tables in fp32
    )
    units: list[FSDPModule] = []
    for layer in model.decoder.layers:
        layer.input_layernorm.to(ranks.device)
        unit = fully_shard(
            layer,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=True,  # a step holds one layer's weights, not all
            ignored_params=set(layer.input_layernorm.parameters()),
        )
        units.append(unit)
    tower = set()
    if model.vision_tower is not None:
        tower = set(model.vision_tower.to(ranks.device).parameters())
    fully_shard(
        model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=tower
    )
    register_fsdp_forward_method(model, "with_decoder")
    for unit, following in pairwise(units):
        # the next layer is gathered while this one computes; two would take memory for no speed
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])
