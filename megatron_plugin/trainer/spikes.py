"""Steps whose loss is far above those before it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

__all__ = ["Spikes"]

WINDOW = 100
LEAST = 20
"""Steps seen before one is judged: the first ones of a run fall too fast for a median."""


class Spikes:
    """Compares a number with the median of the last 100.  `factor` 0: never a spike."""

    def __init__(self, factor: float, seen: Iterable[float] = ()):
        self.factor = factor
        self.seen: deque[float] = deque(seen, maxlen=WINDOW)

    def is_spike(self, value: float) -> bool:
        """Whether `value` is above factor x median.  A median of 0 or below says nothing about size, so nothing is above it."""
        if not self.factor or len(self.seen) < LEAST:
            return False
        median = statistics.median(self.seen)
        return median > 0 and value > self.factor * median

    def add(self, value: float) -> None:
        """Spikes too: where the level has risen for good, the median follows within 50 steps."""
        self.seen.append(value)
