"""Seconds of this rank in the parts of a step, where no return value carries them: numbers of a step are the same on every rank, these are not.

    with timed("data"):
        batches = [rows.batch(micro_batch) for micro_batch in mine]
    metrics |= taken()                     # {"perf/data_s": seconds since the last call}
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

__all__ = ["taken", "timed"]

_spent: Counter[str] = Counter()
_inside: list[float] = []  # of each part under way, the seconds of those inside it


@contextlib.contextmanager
def timed(part: str) -> Iterator[None]:
    """Inside counts as `part`, without what counts as another part there."""
    begin = time.perf_counter()
    _inside.append(0.0)
    try:
        yield
    finally:
        whole = time.perf_counter() - begin
        _spent[part] += whole - _inside.pop()
        if _inside:
            _inside[-1] += whole


def taken() -> dict[str, float]:
    """{"perf/<part>_s": seconds} since the last call."""
    found = {f"perf/{part}_s": seconds for part, seconds in _spent.items()}
    _spent.clear()
    return found
