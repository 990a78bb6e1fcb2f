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
    """'triton', 'cpp' or 'eager' for these logits.  The first CPU tensor may start a compiler (seconds, once per machine)."""
    if _forced != "auto":
        return "triton" if _forced == "cluster" else _forced
    if logits.is_cuda and logits.dtype != torch.float64 and _has_triton():
        return "triton"
    return "cpp" if logits.device.type == "cpu" and logits.dtype in cpu.DTYPES and cpu.available() else "eager"


def cluster_asked_for() -> bool:
    """Whether the one-pass loss shall run in the CUDA kernel of cluster.py.  All else runs in Triton then: it has no other op."""
    return _forced == "cluster"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside the block, for the whole process.  'triton' on CPU tensors needs TRITON_INTERPRET=1; 'cpp' takes CPU tensors only."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend '{name}' is unknown; choose one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
