"""What the rank process of disk.py runs: a real training run whose metrics.jsonl and TensorBoard file are on a full disk for a while."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from unittest import mock

from megatron_plugin.config import load_config
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.trainer import loop, supervised


def train(group, *, overrides: dict, full: range) -> dict:
    """{"lines": of metrics.jsonl; "said": the terminal}.  full: the steps whose lines metrics.jsonl refuses; TensorBoard's file does to the end."""
    config = load_config("configs/debug_cpu.yaml", [f"{key}={value}" for key, value in overrides.items()], world_size=group.size())
    run_dir, original, said = Path(config.run_dir), supervised.optimizer_step, io.StringIO()
    kept = run_dir / "metrics.jsonl.kept"

    def stepping(guard, *arguments):
        step = guard.run.step + 1
        if step == full.start:
            (run_dir / "metrics.jsonl").rename(kept)
            for path in (run_dir / "metrics.jsonl", next((run_dir / "tensorboard").iterdir())):
                path.unlink(missing_ok=True)
                path.symlink_to("/dev/full")
        if step == full.stop:
            kept.replace(run_dir / "metrics.jsonl")
        return original(guard, *arguments)

    with mock.patch.object(supervised, "optimizer_step", stepping), contextlib.redirect_stdout(said):
        loop.train(config)
    return {"lines": read_metrics(config.run_dir), "said": said.getvalue()}
