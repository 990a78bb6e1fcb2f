"""What this project promises when something goes wrong, as cases that can be tried.

Each promise is a module of this folder, named in PROMISES, with

    PROMISE = "what holds, in one sentence with its figure"
    def cases(*, full: bool) -> list[Case]

`make test` tries cases(full=False) of all of them (test_faults.py), `make test-faults` cases(full=True), and writes tests/FAULTS.md (run.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PROMISES: list[str] = [
    "resume",
    "saves",
    "checkpoint_damage",
    "disk",
    "data_position",
    "server",
    "kills",
    "buckets",
    "lines",
    "payloads",
    "exposure",
    "configs",
    "nonfinite",
    "spikes",
    "labels",
    "preemption",
    "exceptions",
    "determinism",
    "long_run",
]
"""Modules of this folder."""


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong, and what must hold then."""

    name: str
    run: Callable[[Path], float | None]
    """Takes an empty directory; raises AssertionError where the promise is broken.  May return the seconds that count, such as those from
    a kill to the end of the job; None: all that it took."""
    tries: int = 1
    """How many times the promise is tried inside, such as the damaged lines of a file."""


def modules() -> list[ModuleType]:
    return [importlib.import_module(f"tests.faults.{name}") for name in PROMISES]
