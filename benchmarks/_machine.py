"""What a page must say about where its numbers come from."""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel", "cut-cross-entropy", "quack-kernels", "transformer-engine", "apex", "verl")


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


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(wide)})"


def versions() -> dict[str, str]:
    """Installed versions; a rival that is not there is absent."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for found_alone in metadata.distributions(path=[p for p in os.environ.get("RIVAL_FILES", "").split(os.pathsep) if p]):
        found[f"{found_alone.name} (files alone)"] = found_alone.version
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _command() -> str:
    """What was typed, less the place of the result file."""
    words = sys.argv[1:]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def describe(device: str) -> dict:
    """The header of a result file."""
    head, dirty = commit()
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "commit": head, "dirty": dirty,
        "command": _command(),
        "device": device, "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2), "versions": versions(),
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{properties.name} ({properties.multi_processor_count} SMs, {properties.total_memory // 2**20} MiB)"
    return facts
