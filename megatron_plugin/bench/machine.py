"""The machine that is measured, and what is installed on it."""

import contextlib
import ctypes
import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel", "cut-cross-entropy", "quack-kernels", "transformer-engine", "apex", "verl")


def cpu_name() -> str:
    """The model of the CPU, and those of its vector and matrix instructions that kernels use."""
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


def environment(device: str) -> dict:
    """Date, hardware, threads, load and versions: beside every result."""
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "device": device, "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2), "versions": versions(),
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{properties.name} ({properties.multi_processor_count} SMs, {properties.total_memory // 2**20} MiB)"
    return facts


def keep_freed_memory() -> None:
    """As with jemalloc, which PyTorch's tuning guide recommends: returning each [T, V] temporary to the system and faulting it in again
    takes up to two thirds of the time of contenders that make them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
