"""Results that are kept for the next epoch, as far as they fit in a given number of bytes."""

import os
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Memo(Generic[V]):
    """Keeps the first values that it is given in its own process, and never drops one.

    Every epoch takes each sample once, so the value used longest ago, which other caches drop, is
    the one that is needed next.
    """

    def __init__(self, most_bytes: int):
        """0: keeps nothing."""
        self.free = most_bytes
        self.values: dict[Hashable, V] = {}
        self.process = os.getpid()  # every worker process would keep as much again

    def get(self, key: Hashable) -> V | None:
        return self.values.get(key)

    def keep(self, key: Hashable, value: V, num_bytes: int) -> V:
        """Returns the value, and keeps it if there is room for num_bytes."""
        if num_bytes <= self.free and key not in self.values and os.getpid() == self.process:
            self.free -= num_bytes
            self.values[key] = value
        return value
