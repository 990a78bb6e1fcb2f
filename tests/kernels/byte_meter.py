"""Counts the bytes a kernel asks for of one tensor, in the interpreter.  Wraps a private name of Triton 3.6-3.9."""

from contextlib import contextmanager

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


class ByteMeter:
    """Stands between the interpreter and memory; counts accesses that fall into `tensor`."""

    def __init__(self, tensor: Tensor, memory):
        self._begin, self._size, self._memory = tensor.data_ptr(), tensor.numel() * tensor.element_size(), memory
        self._bytes = {"load": 0, "store": 0}

    def _count(self, kind: str, pointers, mask, width: int) -> None:
        wanted = np.asarray(pointers).reshape(-1)[np.asarray(mask).reshape(-1).astype(bool)].astype(np.int64)
        self._bytes[kind] += int(((wanted >= self._begin) & (wanted < self._begin + self._size)).sum()) * width

    def load(self, pointers, mask, other, dtype):
        self._count("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._count("store", pointers, mask, np.asarray(value).dtype.itemsize)
        return self._memory.store(pointers, value, mask)

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def passes(self, kind: str) -> float:
        """Bytes asked for over the tensor's size: 1 is one pass over it."""
        return self._bytes[kind] / self._size


@contextmanager
def byte_meter(tensor: Tensor):
    memory = interpreter._interpreter
    interpreter._interpreter = meter = ByteMeter(tensor, memory)
    try:
        yield meter
    finally:
        interpreter._interpreter = memory
