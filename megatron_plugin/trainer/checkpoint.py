"""Checkpoints: weights and optimizer in shards that any layout can load (hooks/dist_checkpoint.py), JSON for the rest.

    <run_dir>/checkpoints/
        step_00000200/     megatron-core's shards, train_state.json, and manifest.json, which names them with their hashes
        latest             the name of the newest one, moved when everything of it is on disk
        best               {"checkpoint": name, "metric": ..., "value": ...}, with checkpoint.best
Written by saving.py; here they are found, verified and loaded.  A directory has its final name only when it is complete.  Beside them may lie
step_*.writing-* of a save that was interrupted (removed at the next start), and step_*.damaged, which a resume has passed over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_plugin.hooks import dist_checkpoint
from megatron_plugin.hooks.checkpoint_pickles import check_pickles
from megatron_plugin.trainer.manifest import MANIFEST, damage, exchange

__all__ = ["CheckpointError", "candidates", "find_checkpoint", "load_checkpoint", "newest", "read_state", "usable"]

log = logging.getLogger("megatron_plugin")
STATE, LATEST = "train_state.json", "latest"
NAME = re.compile(r"step_(\d{8})")


class CheckpointError(ValueError):
    """No checkpoint that can be used where one was asked for."""

    exit_code = 3


def candidates(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run directory, whole or not, in the order in which a resume tries them: the one that `latest` names and those
    finished after it was moved (a kill in between), newest first; then earlier ones; then what an abandoned course of the run has left."""
    folder = Path(run_dir) / "checkpoints"
    found = sorted((p for p in folder.glob("step_*") if NAME.fullmatch(p.name) and p.is_dir()), reverse=True)
    try:
        named, moved = (folder / LATEST).read_text().strip(), (folder / LATEST).stat().st_mtime_ns
    except OSError:
        return found
    fresh = [p for p in found if p.name == named or _written(p) > moved]
    earlier = [p for p in found if p not in fresh and p.name < named]
    return [*fresh, *earlier, *(p for p in found if p not in fresh and p not in earlier)]


def _written(checkpoint: Path) -> int:
    """When its manifest was, in ns; -1 without one."""
    try:
        return (checkpoint / MANIFEST).stat().st_mtime_ns
    except OSError:
        return -1


def newest(run_dir: str | Path) -> Path | None:
    """The checkpoint that a run would go on from, unverified."""
    return next(iter(candidates(run_dir)), None)


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, the newest one if it is a run directory; unverified.  CheckpointError otherwise."""
    path = Path(path)
    if _is_checkpoint(path):
        return path
    found = newest(path)
    if found is None:
        there = "a directory without a complete checkpoint" if path.is_dir() else "nothing" if not path.exists() else "a file"
        raise CheckpointError(f"got {path} ({there}), expected a checkpoint or a run directory that holds one in checkpoints/step_*")
    return found


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and (NAME.fullmatch(path.name) is not None or (path / STATE).is_file())


def usable(path: str | Path, *, rename: bool = False) -> Path:
    """The checkpoint `path`, or the newest of that run directory whose every byte is as it was written; collective.

    Those that are passed over are named in the log and, with `rename`, become step_*.damaged; not one that could only not be read this time.
    CheckpointError when none is left, NewerFormatError at one that another version has written."""
    first = find_checkpoint(path)
    offered = exchange([first] if first == Path(path) else candidates(path))[0]
    problems, lasting = [], []
    for checkpoint in offered:
        problem = damage(checkpoint)
        if problem is None:
            if rename:
                _set_aside(lasting)
            return checkpoint
        problems.append(problem.what)
        lasting += [checkpoint] if problem.lasting else []
        if checkpoint != offered[-1] and dist.get_rank() == 0:
            log.warning("checkpoint %s cannot be used, the one before it is tried: %s", checkpoint.name, problem.what)
    raise CheckpointError(f"none of {len(offered)} checkpoints can be used: {'; '.join(problems)}; restore that file from a copy, or start from another "
                          "checkpoint (checkpoint.resume=PATH or checkpoint.init=PATH) or anew in another run_dir")  # fmt: skip


def _set_aside(damaged: Sequence[Path]) -> None:
    """Rename them to step_*.damaged, so that they are neither tried nor counted again; collective."""
    if dist.get_rank() == 0:
        for checkpoint in damaged:
            aside, n = checkpoint.with_suffix(".damaged"), 1
            while aside.exists():
                aside, n = checkpoint.with_suffix(f".damaged-{n}"), n + 1
            try:
                checkpoint.rename(aside)
                log.warning("%s is now %s; remove it when nobody needs it", checkpoint, aside.name)
            except OSError as error:  # it is in nobody's way: the next resume looks at it again
                log.warning("%s could not be renamed: %s", checkpoint, error)
    dist.barrier()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part: step, data position, true vocabulary, model."""
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: cannot be read ({error}); use another checkpoint of the run") from error


def load_checkpoint(checkpoint: Path, chunks: list, optimizer=None, *, verified: bool = False) -> dict[str, Any]:
    """Load weights, and the optimizer's state if given, whatever layout wrote them.  Returns the JSON part.  Collective.

    `verified`: it comes from `usable`.  CheckpointError when the checkpoint is damaged, could run code, is of another model, or has no state
    for such an optimizer; before any weight is changed in the first two cases."""
    if not verified and (problem := damage(checkpoint)):
        others = [p.name for p in candidates(checkpoint.parent.parent) if p != checkpoint]
        raise CheckpointError(f"{problem.what}: the checkpoint is damaged and nothing of it was loaded; {f'there is also {others[0]}' if others else 'use another'}")
    _refuse_code(checkpoint)
    state = read_state(checkpoint)
    with _as_checkpoint_error(f"{checkpoint}: does not fit this model"):
        dist_checkpoint.load_weights(checkpoint, chunks)
    if optimizer is not None:
        with _as_checkpoint_error(f"{checkpoint}: its optimizer state does not fit this run"):
            dist_checkpoint.load_optimizer(checkpoint, chunks, optimizer)
    return state


def _refuse_code(checkpoint: Path) -> None:
    """Rank 0 looks, all ranks hear: the objects are small, but 512 ranks need not read them."""
    problem = None
    if dist.get_rank() == 0:
        try:
            check_pickles(checkpoint)
        except ValueError as error:
            problem = str(error)
    if problem := exchange(problem)[0]:
        raise CheckpointError(problem)


@contextlib.contextmanager
def _as_checkpoint_error(message: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, dist.DistError, torch.OutOfMemoryError):
        raise  # not the checkpoint's fault, and the lost rank or the device has to be named
    except (Exception, CheckpointException) as error:  # torch derives the latter from BaseException
        raise CheckpointError(f"{message}: {error}") from error
