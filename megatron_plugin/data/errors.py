"""What is wrong with the data, where, and how much of it may be wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["BadLines", "DataError", "some_of"]

SHOWN = 20  # collected before an error stops the scan: enough to see a pattern, few enough to read


class DataError(ValueError):
    """Data that cannot be trained on.  `source` is "file:line" (or the file alone), `reason` says got, expected and the remedy."""

    exit_code = 4

    def __init__(self, reason: str, source: str | None = None):
        super().__init__(reason if source is None else f"{source}: {reason}")
        self.reason = reason
        self.source = source

    @property
    def kind(self) -> str:
        """The reason without what is this line's own, to count by: "messages[*].role is wrong"."""
        text = self.reason.partition(" (")[0].partition(": ")[0].partition(", expected")[0]
        return re.sub(r"(?<![\w-])\d+", "N", re.sub(r"\[\d+\]", "[*]", text))  # not the 8 of UTF-8


def some_of(values: Sequence[object], most: int = 8) -> str:
    """The first `most`, and how many more there are."""
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")


@dataclass
class BadLines:
    """Every line that could not be used, from reading to packing, and the policy about them.

    error (default): any bad line ends the run; up to 20 are collected so that one run shows more than one fault.
    skip: bad lines are left out and counted; more than `max_bad_fraction` of all lines ends the run.
    """

    on_bad_line: str = "error"
    max_bad_fraction: float = 0.001
    lines: int = 0
    errors: list[DataError] = field(default_factory=list)
    _sources: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self):
        if self.on_bad_line not in ("error", "skip"):
            raise ValueError(f"on_bad_line: got {self.on_bad_line!r}, expected 'error' or 'skip'")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ValueError(f"max_bad_fraction: got {self.max_bad_fraction}, expected a number in [0, 1]")

    def __len__(self) -> int:
        return len(self.errors)

    def by_kind(self) -> Counter[str]:
        """How many bad lines have which reason."""
        return Counter(error.kind for error in self.errors)

    def add(self, error: DataError) -> None:
        """Count one bad line, once whatever else is found wrong with it; under 'error' the 20th raises."""
        if error.source is not None and error.source in self._sources:
            return
        self._sources.add(error.source or "")
        self.errors.append(error)
        if self.on_bad_line == "error" and len(self.errors) >= SHOWN:
            self.check()

    def check(self) -> None:
        """DataError, first bad line first, when the policy does not allow what was found so far."""
        if not self.errors:
            return
        if self.on_bad_line == "error":
            raise DataError("\n".join([self.errors[0].reason, *self._others()]), self.errors[0].source)
        if len(self.errors) > self.max_bad_fraction * self.lines:
            share = f"{len(self.errors)} of {self.lines} lines are bad, expected at most the share {self.max_bad_fraction:g}"
            first = f"{share}: mend them or raise data.max_bad_fraction; the first one: {self.errors[0].reason}"
            raise DataError("\n".join([first, *self._others()]), self.errors[0].source)

    def _others(self) -> list[str]:
        rest = [f"  also {error}" for error in self.errors[1:SHOWN]]
        hidden = len(self.errors) - SHOWN
        return [*rest, f"  and {hidden} more"] if hidden > 0 else rest
