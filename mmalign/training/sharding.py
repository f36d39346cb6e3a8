"""The model over many processes: as it is on one, replicated (DDP), or sharded (FSDP2).

Sharded, every decoder layer is a unit: its weights are gathered before it computes and freed after.
The root unit holds embed_tokens, norm, lm_head, the projector and <im_start>/<im_end>'s rows, and
stays gathered from the start of the forward pass to the end of the backward pass, since the loss
reads lm_head's weight outside lm_head. Replicated instead are the frozen vision tower (0.6 GB of a
CLIP ViT-L/14 in bf16: no messages, so a process without an image in a micro-batch need not follow)
and the layers' input norms, which the layer before reads; the gradients of these norms are summed
here, once a step.
"""

import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmalign.batch import PackedBatch
from mmalign.config import ParallelConfig, TrainConfig
from mmalign.distributed import Ranks
from mmalign.errors import UserError
from mmalign.model.llava import Llava
from mmalign.system import DTYPES
from mmalign.training.profile.ranges import stage


class ParallelModel:
    """The model as the loop runs it. Make it before the optimizer: parameters become shards."""

    def __init__(self, model: Llava, config: TrainConfig, ranks: Ranks):
        self.config, self.ranks = config.parallel, ranks
        self.sharded = is_sharded(config.parallel, ranks)
        self.replica: nn.Module = model
        if self.sharded:
            _shard(model, config, ranks)
        else:
            model.to(ranks.device)
            if ranks.world_size > 1:
                self.replica = _data_parallel(model)
        self.replicated = [
            p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)
        ]

    def backward(self, batch: PackedBatch, num_loss_tokens: int, last: bool) -> Tensor:
        """Adds the micro-batch's gradients; last: of the step. Returns its share of the loss.

        The share is of the mean over every supervised token of the step, not a mean of means.
        """
        self._synchronise_gradients(last)
        with stage("copy to device"):
            batch = batch.to(self.ranks.device)
        with stage("forward"):
            share = self.replica(batch) / num_loss_tokens
        with stage("backward"):
            # gradients are averaged over the ranks, so each share is scaled up by their number
            (share * self.ranks.world_size).backward()
            if last and self.sharded:
                self._sum_replicated_gradients()
        return share.detach()

    def _synchronise_gradients(self, last: bool) -> None:
        if isinstance(self.replica, DistributedDataParallel):
            self.replica.require_backward_grad_sync = last  # one reduction a step
        elif self.sharded:
            self.replica.set_requires_gradient_sync(last or not self.config.reduce_once)
            self.replica.set_requires_all_reduce(last)  # between the groups of hybrid sharding

    def _sum_replicated_gradients(self) -> None:
        gradients = [p.grad for p in self.replicated]
        if not gradients:
            return
        flat = torch.cat([grad.flatten().float() for grad in gradients])
        self.ranks.sum(flat).div_(self.ranks.world_size)
        for grad, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            grad.copy_(summed.view_as(grad))


def is_sharded(config: ParallelConfig, ranks: Ranks) -> bool:
    return config.sharding != "none" and ranks.world_size > 1


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
        # the buffers are constants: every process has made its own
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def _mesh(config: ParallelConfig, ranks: Ranks) -> DeviceMesh:
    kind, world_size = ranks.device.type, ranks.world_size
    if config.sharding == "full":
        return init_device_mesh(kind, (world_size,), mesh_dim_names=("shard",))
    size = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % size:
        raise UserError(
            f"--parallel.shard-size {size} does not divide the {world_size} processes of this run"
        )
    shape = (world_size // size, size)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def _shard(model: Llava, config: TrainConfig, ranks: Ranks) -> None:
    """In place; moves one unit after the other to the device, so the whole is never there."""
    parallel, mesh = config.parallel, _mesh(config.parallel, ranks)
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.precision],
        reduce_dtype=DTYPES[parallel.reduce_dtype],
        cast_forward_inputs=False,  # they come in the right precision, rotary tables in fp32
    )
    layers = list(model.decoder.layers)
    for layer in layers:
        layer.input_layernorm.to(ranks.device)
        fully_shard(
            layer,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=parallel.reshard_after_forward,
            ignored_params=set(layer.input_layernorm.parameters()),
        )
    tower = set()
    if model.vision_tower is not None:
        tower = set(model.vision_tower.to(ranks.device).parameters())
    fully_shard(
        model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=tower
    )
    register_fsdp_forward_method(model, "with_decoder")
    for i, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + parallel.prefetch])
        layer.set_modules_to_backward_prefetch(layers[max(0, i - parallel.prefetch) : i][::-1])
