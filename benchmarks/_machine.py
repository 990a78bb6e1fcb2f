"""What a page must say about where its numbers come from."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_plugin.bench.machine import environment

ROOT = Path(__file__).parent.parent


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> tuple[str, bool | None]:
    """(commit, are there uncommitted changes); from BENCH_COMMIT where there is no repository, None when unknown."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("BENCH_COMMIT", "unknown (no repository here)"), None
    changed = [line for line in _git("status", "--porcelain").splitlines() if "benchmarks/results/" not in line]
    return head, bool(changed)


def _command() -> str:
    """What was typed, less the place of the result file."""
    words = sys.argv[1:]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def describe(device: str) -> dict:
    """The header of a result file."""
    head, dirty = commit()
    return {"commit": head, "dirty": dirty, "command": _command()} | environment(device)
