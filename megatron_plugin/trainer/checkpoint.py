"""Checkpoints: weights and optimizer in shards that any layout can load (hooks/dist_checkpoint.py), JSON for the rest.

    <run_dir>/checkpoints/step_00000200/    megatron-core's shards, and train_state.json, which is written last
A directory appears under its final name only when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_plugin.hooks import dist_checkpoint

__all__ = ["CheckpointError", "find_checkpoint", "load_checkpoint", "newest", "save_checkpoint"]

STATE = "train_state.json"
NAME = re.compile(r"step_(\d{8})")


class CheckpointError(ValueError):
    """No checkpoint that can be used where one was asked for."""

    exit_code = 3


def newest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the most steps in a run directory."""
    found = [p for p in (Path(run_dir) / "checkpoints").glob("step_*") if NAME.fullmatch(p.name) and (p / STATE).is_file()]
    return max(found, default=None)


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, the newest one if it is a run directory.  CheckpointError otherwise."""
    path = Path(path)
    if (path / STATE).is_file():
        return path
    found = newest(path)
    if found is None:
        there = "a directory without a complete checkpoint" if path.is_dir() else "nothing" if not path.exists() else "a file"
        raise CheckpointError(f"got {path} ({there}), expected a checkpoint or a run directory that holds one in checkpoints/step_*")
    return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part: step, data position, true vocabulary."""
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: cannot be read ({error}); use another checkpoint of the run") from error


def save_checkpoint(run_dir: str | Path, chunks: list, optimizer, state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of step state["step"]; every rank calls it.  Older ones beyond the `keep` newest are removed (0: none)."""
    final = Path(run_dir) / "checkpoints" / f"step_{state['step']:08d}"
    writing = final.with_suffix(".writing")
    leader = dist.get_rank() == 0
    if leader:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    dist_checkpoint.save(writing, chunks, optimizer)
    dist.barrier()
    if leader:
        with open(writing / STATE, "w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        writing.rename(final)
        old = sorted(p for p in final.parent.glob("step_*") if NAME.fullmatch(p.name))
        for checkpoint in old[:-keep] if keep else []:
            shutil.rmtree(checkpoint)
    dist.barrier()
    return final


def load_checkpoint(checkpoint: Path, chunks: list, optimizer=None) -> dict[str, Any]:
    """Load weights, and the optimizer's state if given, whatever layout wrote them.  Returns the JSON part.

    CheckpointError when the checkpoint is of another model, or has no state for such an optimizer."""
    state = read_state(checkpoint)
    with _as_checkpoint_error(f"{checkpoint}: does not fit this model"):
        dist_checkpoint.load_weights(checkpoint, chunks)
    if optimizer is not None:
        with _as_checkpoint_error(f"{checkpoint}: its optimizer state does not fit this run"):
            dist_checkpoint.load_optimizer(checkpoint, chunks, optimizer)
    return state


@contextlib.contextmanager
def _as_checkpoint_error(message: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, dist.DistError, torch.OutOfMemoryError):
        raise  # not the checkpoint's fault, and the lost rank or the device has to be named
    except (Exception, CheckpointException) as error:  # torch derives the latter from BaseException
        raise CheckpointError(f"{message}: {error}") from error
