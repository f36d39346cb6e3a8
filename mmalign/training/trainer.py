"""The training step of both stages; loop.py runs it over the data.

micro-batches -> forward -> loss / num_loss_tokens -> backward -> gradient norm -> optimizer

The host never waits for a step that it has just launched: its numbers are read one step later.
"""

from contextlib import nullcontext

import numpy as np
import torch
from mmalign_kernels import adding_to_gradients
from torch import Tensor

from mmalign.config import TrainConfig
from mmalign.data.loader import Step
from mmalign.distributed import DistributedContext
from mmalign.model.llava import Llava
from mmalign.training.checkpoint import Checkpoints
from mmalign.training.guards import NonFiniteGuard
from mmalign.training.optimizer import AdamW, Optimizer
from mmalign.training.schedule import learning_rate_at
from mmalign.training.sharding import ParallelModel
from mmalign.training.step_result import StepResult


class Trainer:
    """A model, its optimizer and the step that trains it. Reads and writes no files."""

    def __init__(
        self, config: TrainConfig, ranks: DistributedContext, model: Llava, num_steps: int
    ):
        """model: as build_model returns it, on any device; num_steps: of the whole schedule."""
        self.config, self.ranks, self.model, self.num_steps = config, ranks, model, num_steps
        self.parallel = ParallelModel(model, config, ranks)
        self.parameters = model.trainable_parameters()  # from here on shards, if there are any
        self.optimizer: Optimizer = AdamW(
            self.parameters, config.optimizer, config.seed, ranks.world_size
        )
        self.guard = NonFiniteGuard(config.on_non_finite, ranks.device)
        self.updating = False  # the weights are between two steps
        # on a CPU oneDNN's products are faster, and have no sum
        watched = ranks.world_size > 1 or config.optimizer.update_in_backward
        adds = ranks.device.type == "cuda" and not watched
        self.gradient_sums = adding_to_gradients if adds else nullcontext

    def train_step(self, step: Step, stop: bool = False, save_failed: bool = False) -> StepResult:
        """Launches one optimizer step on exactly the samples of `step`.

        stop, save_failed: flags of this rank. They travel with the loss, so that all ranks act on
        them after the same step.
        """
        # dropout is a function of the step, so a resumed run draws the same masks
        entropy = (self.config.seed, step.index, self.ranks.rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        learning_rate = self.learning_rate(step.index)
        sums = torch.zeros(3, device=self.ranks.device)  # over ranks: loss, stop, save_failed
        sums[1].fill_(stop)
        sums[2].fill_(save_failed)
        for i, batch in enumerate(step.batches):
            last = i == len(step.batches) - 1
            self.parallel.set_gradient_sync(last)  # over the ranks: once per step
            if last and self.config.optimizer.update_in_backward:
                self.updating = True
                self.optimizer.arm(learning_rate, self.guard.open)
            batch = batch.to(self.ranks.device)
            with self.gradient_sums():
                loss = self.parallel.model(batch) / step.num_loss_tokens  # share of the token mean
                (loss * self.ranks.world_size).backward()  # DDP and FSDP2 average over the ranks
            sums[0] += loss.detach()
        self.parallel.finish_gradients()
        sums = self.ranks.sum(sums)
        norm = self.optimizer.gradient_norm()
        finite = self.guard.allows(sums[0], norm)
        self.updating = True
        self.optimizer.step(learning_rate, norm, finite)  # clips; where not finite, no change
        self.optimizer.zero_grad()
        self.updating = False
        numbers = torch.stack((sums[0], norm, finite.float(), sums[1], sums[2]))
        return StepResult(step, learning_rate, numbers)

    def learning_rate(self, step_index: int) -> float:
        optimizer = self.config.optimizer
        return learning_rate_at(
            step_index, self.num_steps, optimizer.learning_rate, optimizer.warmup_ratio
        )

    # ---- what a checkpoint holds ----

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer state, flat by name; a checkpoint is loaded into them in place.

        Nothing else is needed to resume bit for bit: the order of the data and the draws of
        dropout are functions of the seed and the step.
        """
        parameters = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        return parameters | self.optimizer.state()

    def resume(self, checkpoints: Checkpoints, step: int) -> None:
        """Continues from the checkpoint that was saved after `step` optimizer steps."""
        checkpoints.load(step, self.state())
        self.optimizer.step_count = step
