"""Saving checkpoints, so that at every moment a complete one is on disk (checkpoint.py says what one is).

    shards -> train_state.json -> all of it on disk -> manifest.json -> rename step_N.writing-* to step_N -> `latest` -> older ones removed

With checkpoint.asynchronous the shards are written and hashed in a thread while training goes on; what follows them is done by `poll` at the
end of a later step.  What cannot be saved (a full disk) is said and counted, and training goes on; the third time in a row ends the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_plugin.hooks.dist_checkpoint import Shards, WriteError
from megatron_plugin.hooks.mcore import device
from megatron_plugin.trainer.checkpoint import LATEST, NAME, STATE, candidates
from megatron_plugin.trainer.manifest import FORMAT, digests, exchange, sync_folder, write_manifest, write_text

__all__ = ["SaveError", "Saver", "put_back", "save_checkpoint"]

log = logging.getLogger("megatron_plugin")
PATIENCE = 3
"""Failures in a row that end the run."""
BEST = "best"


class SaveError(RuntimeError):
    """No checkpoint could be written, several times in a row."""

    exit_code = 3


def save_checkpoint(run_dir: str | Path, chunks: list, optimizer, state: dict[str, Any], *, keep: int) -> Path:
    """Write one checkpoint, of step state["step"]; every rank calls it.  Older ones beyond the `keep` newest are removed (0: none)."""
    saver = Saver(run_dir, keep=keep)
    saver.save(state, chunks, optimizer, wait=True)
    return saver.folder / _name(state["step"])


def put_back(run_dir: str | Path) -> None:
    """Its name to a checkpoint that was about to be replaced when the job was killed; before a resume looks for one.  Collective."""
    if dist.get_rank() == 0:
        for left in (Path(run_dir) / "checkpoints").glob("step_*.replaced"):
            with contextlib.suppress(OSError):  # a read-only directory, or the new one is there: the old one is removed then
                os.rename(left, left.with_suffix(""))
    dist.barrier()


@dataclass
class _Write:
    """One save under way on this rank."""

    shards: Shards
    folder: Path
    state: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """This rank's, as the manifest will have them."""
    problem: str | None = None
    thread: threading.Thread | None = None

    def run(self) -> None:
        try:
            self.shards.write()
            self.files = digests(self.shards.own_files())
        except Exception as error:  # reported by the rank's vote
            self.problem = f"rank {dist.get_rank()}: {error or type(error).__name__}"


class Saver:
    """The checkpoints of one run; every rank has one and calls its functions at the same time."""

    def __init__(self, run_dir: str | Path, *, keep: int, best: str = "", asynchronous: bool = False):
        self.folder, self.keep, self.best, self.asynchronous = Path(run_dir) / "checkpoints", keep, best, asynchronous
        self.failed = 0
        self._in_a_row = 0
        self._writing: _Write | None = None
        self._saved: int | None = None
        self._seconds: float | None = None
        put_back(run_dir)
        if dist.get_rank() == 0 and self.folder.is_dir():
            with contextlib.suppress(OSError):  # a read-only directory is reported when something is saved
                self._tidy()
        dist.barrier()

    def save(self, state: dict[str, Any], chunks: list, optimizer, *, wait: bool = False) -> None:
        """Save what state["step"] is the step of.  `wait`: return when it is on disk, or raise; else a failure is only counted.

        SaveError for the third failure in a row."""
        begin = time.perf_counter()
        self.finish()
        while True:
            writing = self._begin(state, chunks, optimizer)
            if writing is not None and self.asynchronous and not wait:
                writing.thread = threading.Thread(target=writing.run, name="checkpoint", daemon=True)
                writing.thread.start()
                self._writing = writing
                break
            if writing is not None:
                writing.run()
                self._complete(writing)
            if not wait or self._saved == state["step"]:
                break
        self._seconds = (self._seconds or 0.0) + time.perf_counter() - begin

    def poll(self) -> None:
        """Finish a save whose shards are written on every rank; one small all-reduce while there is one under way, nothing otherwise."""
        if self._writing is not None:
            done = torch.tensor(int(not self._writing.thread.is_alive()), device=device())
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done.item():
                self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and make it a checkpoint.  SaveError as `save`."""
        if self._writing is not None:
            begin, (writing, self._writing) = time.perf_counter(), (self._writing, None)
            writing.thread.join()
            self._complete(writing)
            self._seconds = (self._seconds or 0.0) + time.perf_counter() - begin

    def is_better(self, value: float) -> bool:
        """Whether the metric checkpoint.best has never been as good; the same on every rank, by rank 0's value.  Nothing is better than a number."""
        kept, value = exchange((self._best(), value))[0]
        higher = not self.best.endswith(("nll", "loss"))
        return math.isfinite(value) and (kept is None or (value > kept["value"] if higher else value < kept["value"]))

    def mark_best(self, step: int, value: float) -> None:
        """The checkpoint of `step`, which is on disk, is the best: it is kept until a better one is."""
        if self._saved == step:
            self._agree(lambda: write_text(self.folder / BEST, json.dumps({"checkpoint": _name(step), "metric": self.best, "value": value}) + "\n"),
                        what=f"{self.folder / BEST}")  # fmt: skip

    @property
    def saved(self) -> int | None:
        """The step that was saved last, and is on disk."""
        return self._saved

    def metrics(self) -> dict[str, float]:
        """Of the step that ends: the seconds that saving has held it up, and the saves that failed since the start, where there are any."""
        seconds, self._seconds = self._seconds, None
        return ({} if seconds is None else {"perf/save_s": seconds}) | ({"checkpoint/failed": float(self.failed)} if self.failed else {})

    def _begin(self, state: dict[str, Any], chunks: list, optimizer) -> _Write | None:
        """Decide who writes what; None where not even the directory can be made."""
        name = exchange(f"{_name(state['step'])}.writing-{uuid.uuid4().hex[:8]}")[0]  # new each time: writers of a killed job may still be at theirs
        folder = self.folder / name
        if not self._agree(lambda: folder.mkdir(parents=True), what=str(folder)):
            return None
        copied = self.asynchronous
        return _Write(Shards(folder, chunks, optimizer, copied=copied), folder, {"format": FORMAT} | state)

    def _complete(self, writing: _Write) -> None:
        """From shards on disk to a checkpoint with its name; count it if that fails."""
        try:
            self._name_it(writing)
        finally:
            if dist.get_rank() == 0 and writing.folder.exists():
                shutil.rmtree(writing.folder, ignore_errors=True)  # on a full disk it is what can be given back

    def _name_it(self, writing: _Write) -> None:
        try:
            writing.shards.finish()
        except WriteError as error:
            writing.problem = writing.problem or str(error)
        votes = exchange((writing.problem, writing.files))
        problem = next((problem for problem, _ in votes if problem), None)
        if problem is None:
            files = {name: entry for _, own in votes for name, entry in own.items()}
            if self._agree(lambda: self._publish(writing, files), what=_name(writing.state["step"])):
                self._saved, self._in_a_row = writing.state["step"], 0
        else:
            self._failure(_name(writing.state["step"]), problem)

    def _publish(self, writing: _Write, files: dict[str, dict[str, Any]]) -> None:
        """Rank 0.  OSError; what was there before is there still."""
        folder, final = writing.folder, self.folder / _name(writing.state["step"])
        writing.shards.describe()
        write_text(folder / STATE, json.dumps(writing.state, indent=1))
        rest = [path for path in folder.iterdir() if path.name not in files]
        write_manifest(folder, files | digests(rest))
        replaced = final.with_suffix(".replaced")
        if final.exists():  # of a course of the run that was given up; a kill between the two is put right by put_back
            final.rename(replaced)
        folder.rename(final)
        sync_folder(self.folder)
        write_text(self.folder / LATEST, final.name + "\n")
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(final)

    def _prune(self, newest: Path) -> None:
        best = self._best()
        for checkpoint in [p for p in candidates(self.folder.parent) if p != newest][max(self.keep - 1, 0) :] if self.keep else []:
            if best is None or checkpoint.name != best["checkpoint"]:
                shutil.rmtree(checkpoint, ignore_errors=True)

    def _best(self) -> dict[str, Any] | None:
        """What is marked as the best by the metric checkpoint.best, if it is there still."""
        try:
            kept = json.loads((self.folder / BEST).read_text())
            valid = kept["metric"] == self.best and isinstance(kept["value"], float) and (self.folder / kept["checkpoint"]).is_dir()
            return kept if valid else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _tidy(self) -> None:
        """What an interrupted save has left."""
        for left in self.folder.glob("step_*.writing*"):
            shutil.rmtree(left, ignore_errors=True)
        for left in self.folder.glob(".*.writing"):  # of `latest` or `best`
            left.unlink(missing_ok=True)
        for left in self.folder.glob("step_*.replaced"):
            shutil.rmtree(left, ignore_errors=True)

    def _agree(self, act, *, what: str) -> bool:
        """`act` on rank 0; whether it could, on every rank.  What it raised is counted as a failure."""
        problem = None
        if dist.get_rank() == 0:
            try:
                act()
            except Exception as error:  # the other ranks wait for the verdict, whatever it is
                problem = f"{type(error).__name__}: {error}"
        problem = exchange(problem)[0]
        if problem is not None:
            self._failure(what, problem)
        return problem is None

    def _failure(self, what: str, problem: str) -> None:
        self.failed += 1
        self._in_a_row += 1
        if self._in_a_row >= PATIENCE:
            raise SaveError(f"{what}: could not be saved, the {PATIENCE}rd time in a row: {problem}; make room in {self.folder} or move run_dir, and start again: "
                            f"the run goes on from {(self.folder / LATEST).read_text().strip() if (self.folder / LATEST).exists() else 'its beginning'}")  # fmt: skip
        if dist.get_rank() == 0:
            log.warning("%s: could not be saved, training goes on (%d of %d failures in a row end it): %s", what, self._in_a_row, PATIENCE, problem)


def _name(step: int) -> str:
    name = f"step_{step:08d}"
    assert NAME.fullmatch(name), name
    return name
