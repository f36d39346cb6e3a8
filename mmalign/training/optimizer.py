"""AdamW over named parameters, with clipping by the global norm folded into the update."""

import torch
from mmalign_kernels import adamw_step
from torch import Tensor
from torch.nn import Parameter

from mmalign.config import OptimizerConfig
from mmalign.model.shards import as_shard, local
from mmalign.training.sharding import total_norm


class AdamW:
    """fp32 parameters are updated as they are; bf16 ones keep an exact fp32 master.

    The master of a bf16 parameter is the parameter itself (upper 16 bits) and an int16 remainder
    (lower 16 bits). Moments are fp32. The arithmetic is torch.optim.AdamW's. Of a sharded parameter
    everything is kept for the local rows alone.
    """

    def __init__(self, parameters: dict[str, Parameter], config: OptimizerConfig):
        self.parameters, self.config = parameters, config
        self.step_count = 0
        self.exp_avg = {name: _fp32_zeros(p) for name, p in parameters.items()}
        self.exp_avg_sq = {name: _fp32_zeros(p) for name, p in parameters.items()}
        self.remainder = {
            name: torch.zeros_like(local(p), dtype=torch.int16)
            for name, p in parameters.items()
            if p.dtype == torch.bfloat16
        }

    def gradient_norm(self) -> Tensor:
        """Global norm of all gradients; a 0-dim fp32 tensor, no host sync."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return total_norm(gradients)

    @torch.no_grad()
    def step(
        self, learning_rate: float, gradient_norm: Tensor, allowed: Tensor | None = None
    ) -> None:
        """One update, the gradients scaled down to max_grad_norm where their norm is above it.

        allowed (), bool, on the device: where it is False nothing changes.
        """
        config = self.config
        self.step_count += 1
        scale = None
        if config.max_grad_norm > 0:
            scale = (config.max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1.0)
        if allowed is not None:
            scale = allowed.float() if scale is None else torch.where(allowed, scale, 0.0)
        for dtype in {p.dtype for p in self.parameters.values()}:
            names = [
                name
                for name, p in self.parameters.items()
                if p.dtype == dtype and p.grad is not None and local(p).numel()
            ]
            adamw_step(
                [local(self.parameters[name]) for name in names],
                [local(self.parameters[name].grad) for name in names],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                step=self.step_count,
                learning_rate=learning_rate,
                beta1=config.beta1,
                beta2=config.beta2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                grad_scale=scale,
                remainders=[self.remainder[name] for name in names] if self.remainder else None,
            )

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Flat tensors that a checkpoint stores and loads in place, the parameters included.

        Shards are DTensors, so a checkpoint does not depend on the number of processes.
        """
        kinds = {
            "parameter": self.parameters,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "remainder": self.remainder,
        }
        return {
            f"{kind}.{name}": as_shard(tensor, self.parameters[name]).detach()
            for kind, tensors in kinds.items()
            for name, tensor in tensors.items()
        }


def _fp32_zeros(parameter: Parameter) -> Tensor:
    return torch.zeros_like(local(parameter), dtype=torch.float32)
