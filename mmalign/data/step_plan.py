"""Which samples an optimizer step takes.

The samples of all steps are the endless concatenation of epochs: step i takes the places
[i * global_batch_size, (i + 1) * global_batch_size) of it, so a step's batch has always the full
size and may reach into the next epoch, and a run continues from its step number alone.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """The order of samples: a new permutation in every epoch, or file order."""

    num_samples: int
    global_batch_size: int
    seed: int
    shuffle: bool

    def samples_of_step(self, step: int) -> np.ndarray:
        """Positions (global_batch_size,) int64 in [0, num_samples)."""
        places = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs, within = np.divmod(places, self.num_samples)
        positions = within
        if self.shuffle:
            for epoch in np.unique(epochs):
                order = _epoch_order(self.num_samples, self.seed, int(epoch))
                positions = np.where(epochs == epoch, order[within], positions)
        return positions


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, not default_rng: numpy promises that its streams never change
    return np.random.RandomState([seed, epoch]).permutation(num_samples)


def num_steps_of(num_samples: int, global_batch_size: int, num_epochs: float) -> int:
    """Optimizer steps that see every sample num_epochs times; the last may begin another epoch."""
    return max(1, math.ceil(num_samples * num_epochs / global_batch_size))
