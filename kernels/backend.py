"""Which implementation of the row kernels runs: Triton on CUDA tensors, tiled PyTorch elsewhere and for fp64."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "eager")
_forced = "auto"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def select(logits: Tensor) -> str:
    """'triton' or 'eager' for these logits."""
    if _forced != "auto":
        return _forced
    return "triton" if logits.is_cuda and logits.dtype != torch.float64 and _has_triton() else "eager"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside the block, for the whole process.  'triton' on CPU tensors needs TRITON_INTERPRET=1."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend '{name}' is unknown; choose one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
