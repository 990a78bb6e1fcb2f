"""Checkpoints: megatron-core's dist_checkpointing for weights and optimizer (any layout can load them), JSON for the rest.

    <run_dir>/checkpoints/step_00000200/    megatron-core's shards, and train_state.json, which is written last
A directory appears under its final name only when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from torch.distributed.checkpoint.api import CheckpointException

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
    dist_checkpointing.save(_sharded_state(chunks, optimizer, is_loading=False), str(writing))
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
    """Load weights, and the optimizer's state if given, whatever layout wrote them.  Returns the JSON part."""
    state = read_state(checkpoint)
    try:
        loaded = dist_checkpointing.load(_sharded_state(chunks, optimizer, is_loading=True), str(checkpoint))
    except (Exception, CheckpointException) as error:  # torch derives the latter from BaseException
        raise CheckpointError(f"{checkpoint}: does not fit this model: {error}") from error
    for i, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[_key(chunks, i)])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return state


def _key(chunks: list, i: int) -> str:
    return "model" if len(chunks) == 1 else f"model{i}"


def _sharded_state(chunks: list, optimizer, *, is_loading: bool) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = {_key(chunks, i): chunk.module.sharded_state_dict(metadata={"dp_cp_group": group}) for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded, is_loading=is_loading)
    return sharded
