"""AdamW over named parameters, with clipping by the global norm folded into the update."""

from functools import partial

import torch
from mmalign_kernels import adamw_step
from mmalign_kernels.adamw import BLOCK, num_blocks
from torch import Tensor
from torch.distributed.tensor import DTensor, zeros
from torch.nn import Parameter

from mmalign.config import OptimizerConfig
from mmalign.errors import UserError
from mmalign.model.shards import local
from mmalign.training.sharding import total_norm

MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}


class AdamW:
    """torch.optim.AdamW's arithmetic in fp32, on shards where parameters are sharded.

    fp32 parameters are updated as they are. Of a bf16 parameter config.master says what is kept:
    an int16 remainder, the lower half of an exact fp32 master whose upper half is the parameter
    ("split"); an fp32 copy; or nothing, and the update is rounded at random. Moments narrower than
    fp32 are rounded at random; vectors keep theirs in fp32, they weigh nothing.

    Gradients have the parameters' type and add up in it over the micro-batches of a step.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        config: OptimizerConfig,
        seed: int = 0,
        world_size: int = 1,
    ):
        """seed: of the random rounding; it and the step alone decide, so a continued run repeats.

        Raises UserError for what update_in_backward excludes.
        """
        self.parameters, self.config, self.seed = parameters, config, seed
        self.step_count = 0
        halves = {name: p for name, p in parameters.items() if p.dtype == torch.bfloat16}
        kept = halves if config.master == "split" else {}
        self.remainder = {
            name: torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
            for name, p in kept.items()
        }
        copied = halves if config.master == "fp32-copy" else {}
        self.master = {name: p.detach().float() for name, p in copied.items()}
        self.exp_avg = {name: _moment(p, config) for name, p in parameters.items()}
        self.exp_avg_sq = {name: _moment(p, config) for name, p in parameters.items()}
        codes = [name for name, moment in self.exp_avg.items() if moment.dtype == torch.uint8]
        self.exp_avg_scale = {name: _scales(name, parameters[name]) for name in codes}
        self.exp_avg_sq_scale = {name: _scales(name, parameters[name]) for name in codes}
        self._names = list(parameters)
        self._armed: tuple[float, Tensor | None] | None = None
        self._norms: list[Tensor] = []  # of the gradients that the backward pass has used up
        check_update_in_backward(config, world_size)
        if config.update_in_backward:
            for name, p in parameters.items():
                p.register_post_accumulate_grad_hook(partial(self._use_up, name))

    def gradient_norm(self) -> Tensor:
        """Global norm of all gradients; a 0-dim fp32 tensor, no host sync."""
        if self._norms:
            norms, self._norms = self._norms, []
            return torch.linalg.vector_norm(torch.stack(norms))
        return total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    @torch.no_grad()
    def step(
        self, learning_rate: float, gradient_norm: Tensor, allowed: Tensor | None = None
    ) -> None:
        """One update, the gradients scaled down to max_grad_norm where their norm is above it.

        allowed: () bool on the device; where it is False nothing changes, and the host need not
        know. After `arm` the backward pass has made the update, and this only counts it.
        """
        self.step_count += 1
        if self._armed is not None:
            self._armed = None
            return
        scale = None
        if self.config.max_grad_norm > 0:
            scale = (self.config.max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1.0)
        if allowed is not None:
            scale = torch.where(allowed, 1.0 if scale is None else scale, 0.0)
        groups: dict[tuple, list[str]] = {}
        for name, p in self.parameters.items():
            if p.grad is not None and local(p).numel():
                key = p.dtype, self.exp_avg[name].dtype, name in self.master
                groups.setdefault(key, []).append(name)
        for names in groups.values():
            self._update(names, self.step_count, learning_rate, scale)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    # ---- update in the backward pass ----

    def arm(self, learning_rate: float, allowed: Tensor | None = None) -> None:
        """Before the backward pass of a step's last micro-batch, with config.update_in_backward.

        Each parameter is updated as soon as its gradient is complete, and the gradient is freed.
        Where allowed, () bool, is False nothing changes; a gradient that is not finite leaves its
        own parameter as it is.
        """
        self._armed, self._norms = (learning_rate, allowed), []

    @torch.no_grad()
    def _use_up(self, name: str, parameter: Parameter) -> None:
        if self._armed is None:  # not the step's last micro-batch: gradients add up
            return
        learning_rate, allowed = self._armed
        norm = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32)
        finite = norm.isfinite() if allowed is None else norm.isfinite() & allowed
        self._norms.append(norm)
        self._update([name], self.step_count + 1, learning_rate, finite.float())
        parameter.grad = None

    # ---- the update of parameters that are kept alike ----

    def _update(
        self, names: list[str], step: int, learning_rate: float, scale: Tensor | None
    ) -> None:
        if names[0] in self.master:
            for name in names:  # one at a time: each needs an fp32 gradient for the moment
                self._update_copied(name, step, learning_rate, scale)
            return
        params = self._local(self.parameters, names)
        grads = [local(self.parameters[name].grad) for name in names]
        self._adamw(params, grads, names, step, learning_rate, scale)

    def _update_copied(
        self, name: str, step: int, learning_rate: float, scale: Tensor | None
    ) -> None:
        parameter, master = self.parameters[name], local(self.master[name])
        gradient = local(parameter.grad).float()
        self._adamw([master], [gradient], [name], step, learning_rate, scale)
        local(parameter.detach()).copy_(master)

    def _adamw(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        names: list[str],
        step: int,
        learning_rate: float,
        scale: Tensor | None,
    ) -> None:
        config, moment = self.config, self.exp_avg[names[0]].dtype
        splits, codes = names[0] in self.remainder, moment == torch.uint8
        rounds = moment != torch.float32 or (params[0].dtype == torch.bfloat16 and not splits)
        adamw_step(
            params,
            grads,
            self._local(self.exp_avg, names),
            self._local(self.exp_avg_sq, names),
            step=step,
            learning_rate=learning_rate,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            grad_scale=scale,
            remainders=self._local(self.remainder, names) if splits else None,
            exp_avg_scales=self._local(self.exp_avg_scale, names) if codes else None,
            exp_avg_sq_scales=self._local(self.exp_avg_sq_scale, names) if codes else None,
            seed=self._draw_seed(names[0]) if rounds else None,
        )

    def _local(self, tensors: dict[str, Tensor], names: list[str]) -> list[Tensor]:
        return [local(tensors[name].detach()) for name in names]

    def _draw_seed(self, name: str) -> int:
        """Another one for every call and shard: equal draws would round together."""
        index = self._names.index(name) * 2**16 + _shard_index(self.parameters[name])
        return (self.seed * 2**32 + index) % 2**43

    def state(self) -> dict[str, Tensor]:
        """Flat tensors that a checkpoint stores and loads in place, the parameters included."""
        kinds = {
            "parameter": self.parameters,
            "master": self.master,
            "remainder": self.remainder,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "exp_avg_scale": self.exp_avg_scale,
            "exp_avg_sq_scale": self.exp_avg_sq_scale,
        }
        return {
            f"{kind}.{name}": tensor.detach()
            for kind, tensors in kinds.items()
            for name, tensor in tensors.items()
        }


def check_update_in_backward(config: OptimizerConfig, world_size: int) -> None:
    """UserError for what it excludes."""
    if not config.update_in_backward:
        return
    if config.max_grad_norm > 0:
        raise UserError(
            "--optimizer.update-in-backward updates a weight before the gradients of the others "
            f"are known, but --optimizer.max-grad-norm {config.max_grad_norm:g} scales all of them "
            "by their common norm. Turn one of them off: --optimizer.max-grad-norm 0, or "
            "--optimizer.update-in-backward False"
        )
    if world_size > 1:
        raise UserError(
            "--optimizer.update-in-backward updates a weight before its gradients are summed over "
            f"the {world_size} processes of this run. Give --optimizer.update-in-backward False"
        )


def moment_dtype(shape: torch.Size | tuple[int, ...], config: OptimizerConfig) -> torch.dtype:
    """How the moments of a parameter of this shape are kept."""
    return MOMENT_DTYPES[config.moments] if len(shape) > 1 else torch.float32


def _moment(parameter: Parameter, config: OptimizerConfig) -> Tensor:
    dtype = moment_dtype(parameter.shape, config)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _scales(name: str, parameter: Parameter) -> Tensor:
    """fp32, one for 128 neighbours: by rows where rows are whole blocks, so that they shard."""
    shape = (num_blocks(parameter.numel()),)
    if parameter.shape[-1] % BLOCK == 0:
        shape = (*parameter.shape[:-1], parameter.shape[-1] // BLOCK)
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=torch.float32, device=parameter.device)
    if len(shape) == 1:
        raise cannot_shard_codes(name, tuple(parameter.shape))
    mesh, placements = parameter.device_mesh, parameter.placements
    return zeros(shape, dtype=torch.float32, device_mesh=mesh, placements=placements)


def cannot_shard_codes(name: str, shape: tuple[int, ...]) -> UserError:
    return UserError(
        f"--optimizer.moments 8bit: the rows of {name} {shape} are no whole blocks of {BLOCK}, so "
        "its scales cannot be sharded. Give --optimizer.moments bf16, or --parallel.sharding none"
    )


def _shard_index(parameter: Parameter) -> int:
    """Which part of the whole this process holds; replicas of a part have the same index."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, index = parameter.device_mesh, 0
    for size, place, kind in zip(
        mesh.shape, mesh.get_coordinate(), parameter.placements, strict=True
    ):
        index = index * size + place if kind.is_shard() else index
    return index
