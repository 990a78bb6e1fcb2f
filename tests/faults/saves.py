"""kill -9 at seeded operations on files while a checkpoint is saved, beside the training or not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.faults.promises import Case
from tests.faults.saving_job import run, seeded

PROMISE = "after kill -9 during a save a complete checkpoint is there, at most one save old, loads bit by bit, and what was left over is removed"
KILLS = 20
AT_LEAST = (80, 9)
"""Operations on files of each rank in three saves: of rank 0 shards, state, manifest, renames, syncs, removals; of rank 1 its shards (100 and 12)."""


def cases(*, full: bool) -> list[Case]:
    kills = KILLS if full else 2
    return [Case(f"{kills} kills", partial(kill, kills=kills, measured=full), kills), Case("kill while a step is saved again", replaced, 2)]


def kill(folder: Path, *, kills: int, measured: bool) -> None:
    """Every second save is an asynchronous one.  `measured`: the kills are spread over all operations that a run without one makes."""
    operations = [AT_LEAST, AT_LEAST]
    if measured:
        (folder / "clean").mkdir()
        clean = run(folder / "clean", [{"asynchronous": False}, {"asynchronous": True}])
        assert all(answer["codes"] == [0, 0] and answer["used"] == 4 and answer["right"] for answer in clean), clean
        operations = [tuple(rank["operations"] for rank in answer["ranks"]) for answer in clean]
        assert all(found >= least for own in operations for found, least in zip(own, AT_LEAST, strict=True)), operations
    trials = [seeded(seed, operations[seed % 2], asynchronous=seed % 2 == 1) | {"kills": True} for seed in range(kills)]
    for trial, answer in zip(trials, run(folder, trials), strict=True):
        assert -9 in answer["codes"], (trial, answer)
        assert answer.get("right"), (trial, answer)
        assert answer["used"] >= max(1, answer["reported"]), (trial, answer)
        assert not answer["left"], (trial, answer)


def replaced(folder: Path) -> None:
    """Between the two renames that put a checkpoint in the place of one of the same step, the old one has another name and the new one none."""
    trials = [{"rank": 0, "again": True, "kills_at": ".replaced", "asynchronous": asynchronous} for asynchronous in (False, True)]
    for trial, answer in zip(trials, run(folder, trials), strict=True):
        assert -9 in answer["codes"] and answer["reported"] == 2, (trial, answer)
        assert answer.get("used") == 2 and answer["right"] and not answer["left"], (trial, answer)
