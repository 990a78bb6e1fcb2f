"""rollouts.jsonl: every sample that was drawn and judged, one line each, whether it was trained on or dropped with its group.

    log = RolloutLog(run_dir / "rollouts.jsonl", resumed_at=120)      # what a killed run logged beyond step 120 is done again, and logged again
    log.add([RolloutLine(step=121, source="prompts.jsonl:7", prompt="Tom has ...", completion="5+7=12\\n#### 12", tokens=9, reward=1.0, ...)])
    log.close()
    cut_rollouts(run_dir, resumed_at=120, first=2)                    # the same for files of leaders that this run, with two, has not

One process writes a file: leader 0 rollouts.jsonl, leader N rollouts.N.jsonl.  A step's lines are written at once, so a kill leaves at most
a torn last line, which the next start drops.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

__all__ = ["RolloutLine", "RolloutLog", "append_whole", "cut_rollouts", "read_rollouts"]

FILES = re.compile(r"rollouts(?:\.(\d+))?\.jsonl")


@dataclass(frozen=True, kw_only=True)
class RolloutLine:
    """One sample."""

    step: int
    source: str
    """Of the prompt: file:line."""
    prompt: str
    completion: str
    tokens: int
    reward: float
    cause: str
    """RewardResult.cause"""
    advantage: float
    finish_reason: str
    weight_version: int


class RolloutLog:
    """Appends to `path`.  `dropped`: lines left out at the start, of steps after `resumed_at` or torn."""

    def __init__(self, path: str | Path, *, resumed_at: int):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.dropped = _cut(self.path, resumed_at)
        self._file = open(self.path, "ab", buffering=0)

    def add(self, lines: Iterable[RolloutLine]) -> None:
        """Write them, in one piece.  OSError: none of them."""
        text = "".join(json.dumps({name: _plain(value) for name, value in asdict(line).items()}, allow_nan=False) + "\n" for line in lines)
        append_whole(self._file, text.encode("ascii"))

    def close(self) -> None:
        self._file.close()


def append_whole(file: RawIOBase, data: bytes) -> None:
    """All of `data` behind what `file`, opened with "ab" and buffering=0, holds; where it refuses, nothing of it, and OSError."""
    before, rest = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while rest:  # an unbuffered write may take only a part, of more than 2 GiB or on a disk that fills up
            rest = rest[file.write(rest) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(before)
        raise


def cut_rollouts(run_dir: str | Path, *, resumed_at: int, first: int = 0) -> int:
    """Drop lines of steps after `resumed_at`, and torn ones, from rollouts.jsonl (number 0) and every rollouts.N.jsonl, N >= `first`, of a run
    directory, whichever run wrote them; how many.  Each file is replaced at once or stays as it was; other files are left alone.

    A file that a RolloutLog holds open must not be cut: its writer would go on in the file that was replaced.  With `first` the number of this
    run's leaders only files without a writer are touched, and no leader need wait; with 0, cut before any leader opens its log.
    """
    dropped = 0
    for path in sorted(Path(run_dir).glob("rollouts*.jsonl")):
        if (name := FILES.fullmatch(path.name)) and int(name[1] or 0) >= first:
            dropped += _cut(path, resumed_at)
    return dropped


def read_rollouts(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of rollouts.jsonl; torn ones are left out."""
    with open(path, "rb") as file:
        for line in file:
            if (record := _record(line)) is not None:
                yield record


def _plain(value: Any) -> Any:
    """What every JSON reader takes: no NaN, and U+FFFD for half a surrogate pair, which many refuse even when it is escaped."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _cut(path: Path, resumed_at: int) -> int:
    """Leave only whole lines of steps up to `resumed_at`: the file is replaced at once or stays as it was.  How many were dropped."""
    if not path.exists():
        return 0
    temporary = path.with_name(f".{path.name}.tmp")
    dropped = 0
    with open(path, "rb") as old, open(temporary, "wb") as new:
        for line in old:
            record = _record(line)
            if record is not None and record["step"] <= resumed_at:
                new.write(line)
            else:
                dropped += 1
        new.flush()
        os.fsync(new.fileno())
    if dropped:
        os.replace(temporary, path)
    else:
        temporary.unlink()
    return dropped
