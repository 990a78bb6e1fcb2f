"""A disk that is full (ENOSPC) or broken (EIO) from a seeded operation of a save on, on either rank."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.faults.problems import small_run
from tests.faults.promises import Case
from tests.faults.saves import AT_LEAST
from tests.faults.saving_job import BROKEN, FULL, run, seeded
from tests.spawn import on_ranks

PROMISE = ("while a checkpoint cannot be written training goes on on every rank, the failure is counted, the last checkpoint stays; the third in a row ends the run; "
           "while metrics.jsonl cannot be, training goes on and counts")  # fmt: skip
TRIALS = 12
ONE_SAVE = (20, 3)
"""Operations of a rank that belong to one save and not to the removal of older ones."""
THREE = {"rank": 0, "operation": 5, "fails_from": 2, "errno": FULL}


def cases(*, full: bool) -> list[Case]:
    trials = TRIALS if full else 1
    return [Case(f"{trials} saves fail, and three in a row", partial(fails, trials=trials), trials + 1), Case("metrics.jsonl is refused", refused)]


def fails(folder: Path, *, trials: int) -> None:
    assert all(3 * one <= least for one, least in zip(ONE_SAVE, AT_LEAST, strict=True))
    planned = [seeded(seed, ONE_SAVE, asynchronous=seed % 2 == 1) | {"fails_in": 2, "errno": (FULL, BROKEN)[seed // 2 % 2]} for seed in range(trials)]
    *answers, last = run(folder, [*planned, THREE])
    for trial, answer in zip(planned, answers, strict=True):
        assert answer["codes"] == [0, 0], (trial, answer)
        assert answer["used"] == 4 and answer["right"] and not answer["left"], (trial, answer)
        assert [rank["failed"] for rank in answer["ranks"]] == [1, 1], (trial, answer)
    assert last["codes"] == [3, 3], last
    assert last["used"] == 1 and last["right"] and [rank["failed"] for rank in last["ranks"]] == [3, 3], last


def refused(folder: Path) -> None:
    """A whole run of one rank, whose log is on /dev/full in its second and third step."""
    overrides = small_run(folder, **{"train.steps": "5", "train.global_batch": "4", "data.eval_samples": "2"})
    (found,) = on_ranks(1, "tests.faults.log_ranks", "train", overrides=overrides, full=range(2, 4))
    assert [(line["step"], line.get("log/failed")) for line in found["lines"]] == [(1, None), (4, 2.0), (5, 2.0)], found["lines"]
    assert found["said"].count("metrics.jsonl cannot be written") == found["said"].count("TensorBoard's files cannot be written") == 1, found["said"]
    assert (folder / "run/checkpoints/step_00000005/manifest.json").exists()
