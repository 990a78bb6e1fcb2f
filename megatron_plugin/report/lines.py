"""metrics.jsonl of a run, as its pages and curves read it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

__all__ = ["read_metrics"]


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; one cut off by a kill, or otherwise damaged, is left out."""
    lines = []
    path = Path(run_dir) / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
