"""Which implementation of the row kernels runs: Triton on CUDA tensors, C++ on CPU tensors, tiled PyTorch elsewhere and for fp64."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_plugin.kernels import cpu

BACKENDS = ("auto", "triton", "cpp", "eager", "cluster")
_forced = "auto"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def select(logits: Tensor) -> str:
    """'triton', 'cpp' or 'eager' for these logits.  The first CPU tensor may start a compiler (seconds, once per machine).

    ValueError where Triton was asked for by name and cannot take them.
    """
    if _forced in ("triton", "cluster"):
        _check_triton(logits)
        return "triton"
    if _forced != "auto":
        return _forced
    if logits.is_cuda and logits.dtype != torch.float64 and _has_triton():
        return "triton"
    return "cpp" if logits.device.type == "cpu" and logits.dtype in cpu.DTYPES and cpu.available() else "eager"


def _check_triton(logits: Tensor) -> None:
    if not _has_triton():
        raise ValueError(f"backend '{_forced}' was asked for, but Triton is not installed: pip install triton, or use_backend('auto')")
    if logits.dtype == torch.float64:
        raise ValueError(f"backend '{_forced}' got {logits.dtype} logits, its kernels work in fp32: use_backend('auto') or 'eager' keeps fp64")
    if logits.device.type == "cpu" and not _interpreted():
        raise ValueError(
            f"backend '{_forced}' got logits on the CPU, for which Triton makes no code: use_backend('auto'), or set TRITON_INTERPRET=1 before the "
            "first import of megatron_plugin to run the kernels in Triton's interpreter (slow, for tests)"
        )


@cache
def _interpreted() -> bool:
    """Whether the kernels were decorated under TRITON_INTERPRET=1, which counts at their import, not at their call."""
    from triton import JITFunction

    from megatron_plugin.kernels.stats import stats_kernel

    return not isinstance(stats_kernel, JITFunction)


def cluster_asked_for() -> bool:
    """Whether the one-pass loss shall run in the CUDA kernel of cluster.py.  All else runs in Triton then: it has no other op."""
    return _forced == "cluster"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside the block, for the whole process; what it cannot take is a ValueError, never another backend's result.

    'triton' takes no fp64, and CPU tensors only with TRITON_INTERPRET=1; 'cpp' takes CPU tensors only, and no fp64.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend '{name}' is unknown; choose one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
