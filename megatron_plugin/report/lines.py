"""metrics.jsonl of a run, as its pages and curves read it."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["read_metrics"]


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    path = Path(run_dir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
