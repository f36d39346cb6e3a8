"""What the trainer asks of an optimizer, and AdamW with clipping folded into the update."""

from collections.abc import Mapping
from functools import partial
from typing import Protocol

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


class Optimizer(Protocol):
    """All that the trainer, the memory plan and checkpoints use of an optimizer."""

    step_count: int  # updates so far; set when a run resumes

    def arm(self, learning_rate: float, allowed: Tensor | None) -> None:
        """With update_in_backward, before the backward pass of the step's last micro-batch."""

    def gradient_norm(self) -> Tensor:
        """Global norm of all gradients; a 0-dim fp32 tensor on the device, no host sync."""
        ...

    def step(self, learning_rate: float, gradient_norm: Tensor, allowed: Tensor | None) -> None:
        """One update with clipped gradients; no change where allowed, () bool, is False."""

    def zero_grad(self) -> None:
        """Frees the gradients."""

    def state(self) -> dict[str, Tensor]:
        """Flat tensors by name, without the parameters; a checkpoint is loaded into them."""
        ...

    @staticmethod
    def state_bytes(numel: int, num_dims: int, itemsize: int, config: OptimizerConfig) -> int:
        """Bytes of state for a parameter (or shard) of numel elements of itemsize bytes."""
        ...


class AdamW:
    """torch.optim.AdamW's arithmetic in fp32, on shards where parameters are sharded.

    fp32 parameters are updated in place. For a bf16 parameter config.master says what is kept:
    an int16 tensor with the low 16 bits of an exact fp32 master whose high bits are the parameter
    ("split"); an fp32 copy; or nothing, with stochastic rounding of the update. Moments narrower
    than fp32 use stochastic rounding; 1-D parameters keep fp32 moments, whose memory is negligible.

    Gradients have the parameters' dtype and accumulate in it over the micro-batches of a step.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        config: OptimizerConfig,
        seed: int = 0,
        world_size: int = 1,
    ):
        """seed: of stochastic rounding, which depends on it and the step alone.

        Raises UserError for settings that update_in_backward excludes.
        """
        self.parameters, self.config, self.seed = parameters, config, seed
        self.step_count = 0
        in_bf16 = {name: p for name, p in parameters.items() if p.dtype == torch.bfloat16}
        split = in_bf16 if config.master == "split" else {}
        self.remainder = {  # low 16 bits of the fp32 master
            name: torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
            for name, p in split.items()
        }
        copied = in_bf16 if config.master == "fp32-copy" else {}
        self.master = {name: p.detach().float() for name, p in copied.items()}
        self.exp_avg = {name: _moment(p, config) for name, p in parameters.items()}
        self.exp_avg_sq = {name: _moment(p, config) for name, p in parameters.items()}
        codes = [name for name, moment in self.exp_avg.items() if moment.dtype == torch.uint8]
        self.exp_avg_scale = {name: _scales(name, parameters[name]) for name in codes}
        self.exp_avg_sq_scale = {name: _scales(name, parameters[name]) for name in codes}
        self._names = list(parameters)
        self._armed: tuple[float, Tensor | None] | None = None
        self._norms: list[Tensor] = []  # of gradients that the backward pass applied and freed
        check_update_in_backward(config, world_size)
        if config.update_in_backward:
            for name, p in parameters.items():
                p.register_post_accumulate_grad_hook(partial(self._update_and_free, name))

    def gradient_norm(self) -> Tensor:
        if self._norms:
            norms, self._norms = self._norms, []
            return torch.linalg.vector_norm(torch.stack(norms))
        return total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    @torch.no_grad()
    def step(
        self, learning_rate: float, gradient_norm: Tensor, allowed: Tensor | None = None
    ) -> None:
        """One update, with the gradients scaled down to max_grad_norm where their norm exceeds it.

        allowed: () bool on the device; where it is False nothing changes, without the host knowing.
        After `arm` the backward pass has made the update, and this only counts it.
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
        """Lets the next backward pass update each parameter once its gradient is complete.

        The gradient is then freed. Where allowed, () bool, is False nothing changes; a non-finite
        gradient leaves its own parameter unchanged.
        """
        self._armed, self._norms = (learning_rate, allowed), []

    @torch.no_grad()
    def _update_and_free(self, name: str, parameter: Parameter) -> None:
        if self._armed is None:  # not the step's last micro-batch: gradients accumulate
            return
        learning_rate, allowed = self._armed
        norm = torch.linalg.vector_norm(self._gradient(name), dtype=torch.float32)
        finite = norm.isfinite() if allowed is None else norm.isfinite() & allowed
        self._norms.append(norm)
        self._update([name], self.step_count + 1, learning_rate, finite.float())
        parameter.grad = None

    # ---- the update of parameters with the same kind of state ----

    def _update(
        self, names: list[str], step: int, learning_rate: float, scale: Tensor | None
    ) -> None:
        if names[0] in self.master:
            for name in names:  # one at a time: each needs an fp32 gradient for the moment
                self._update_copied(name, step, learning_rate, scale)
            return
        params = self._local(self.parameters, names)
        grads = [self._gradient(name) for name in names]
        self._adamw(params, grads, names, step, learning_rate, scale)

    def _update_copied(
        self, name: str, step: int, learning_rate: float, scale: Tensor | None
    ) -> None:
        parameter, master = self.parameters[name], local(self.master[name])
        gradient = self._gradient(name).float()
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

    def _gradient(self, name: str) -> Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None, f"{name} has no gradient"
        return local(gradient)

    def _local(self, tensors: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
        return [local(tensors[name].detach()) for name in names]

    def _draw_seed(self, name: str) -> int:
        """Different for every call and shard: equal draws would round in the same direction."""
        index = self._names.index(name) * 2**16 + _shard_index(self.parameters[name])
        return (self.seed * 2**32 + index) % 2**43

    def state(self) -> dict[str, Tensor]:
        """Flat tensors by name, without the parameters."""
        kinds = {
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

    @staticmethod
    def state_bytes(numel: int, num_dims: int, itemsize: int, config: OptimizerConfig) -> int:
        """Of a parameter (or shard) with numel elements of itemsize bytes, in num_dims dimensions.

        Master weight (bf16 parameters only), both moments, and the scales of 8-bit moments.
        """
        moment = moment_dtype(num_dims, config)
        scales = 4 * num_blocks(numel) if moment == torch.uint8 else 0
        master = {"split": 2, "fp32-copy": 4, "stochastic": 0}[config.master]
        return (master * numel if itemsize == 2 else 0) + 2 * (moment.itemsize * numel + scales)


def check_update_in_backward(config: OptimizerConfig, world_size: int) -> None:
    """Raises UserError for settings that update_in_backward excludes."""
    if not config.update_in_backward:
        return
    if config.max_grad_norm > 0:
        raise UserError(
            "--optimizer.update-in-backward updates a weight before the other gradients are known, "
            f"but --optimizer.max-grad-norm {config.max_grad_norm:g} scales all of them by their "
            "global norm. Turn one of them off: --optimizer.max-grad-norm 0, or "
            "--optimizer.update-in-backward False"
        )
    if world_size > 1:
        raise UserError(
            "--optimizer.update-in-backward updates a weight before its gradients are summed over "
            f"the {world_size} processes of this run. Use --optimizer.update-in-backward False"
        )


def moment_dtype(num_dims: int, config: OptimizerConfig) -> torch.dtype:
    """Of both moments of a parameter with this number of dimensions."""
    return MOMENT_DTYPES[config.moments] if num_dims > 1 else torch.float32


def _moment(parameter: Parameter, config: OptimizerConfig) -> Tensor:
    dtype = moment_dtype(parameter.dim(), config)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _scales(name: str, parameter: Parameter) -> Tensor:
    """fp32, one per block of 128 elements; by rows where a row is whole blocks, so they shard."""
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
        f"--optimizer.moments 8bit: the row length of {name} {shape} is not a multiple of {BLOCK}, "
        "so its scales cannot be sharded. Use --optimizer.moments bf16 or --parallel.sharding none"
    )


def _shard_index(parameter: Parameter) -> int:
    """Index of this process's shard of the parameter; replicas of a shard share it."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, index = parameter.device_mesh, 0
    coordinate = mesh.get_coordinate() or ()  # None outside of the mesh, where nobody asks
    for size, place, kind in zip(mesh.shape, coordinate, parameter.placements, strict=True):
        index = index * size + place if kind.is_shard() else index
    return index
