"""Plain data between the op and its kernels: which columns a shard holds, where its rows lie in memory, how a kernel is launched."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The columns of the vocabulary in one logits tensor, and what all shards of a row agree on."""

    vocab_start: int
    """First column's id in the whole vocabulary."""
    vocab_size: int
    """True size of the whole vocabulary; columns at or beyond it are padding and count as -inf."""
    ignore_index: int
    """Label of a masked row."""
    temperature: float
    """Logits are divided by it before the softmax."""

    def scale2(self, dtype: torch.dtype) -> float:
        """Factor from raw logits to base-2 exponents, rounded to the working dtype, fp32 or fp64: what the kernels multiply by."""
        factor = math.log2(math.e) / self.temperature
        if dtype == torch.float64:
            return factor
        shifted = factor * (2.0**29 + 1.0)  # Veltkamp's split: 24 bits by plain arithmetic, which torch.compile can trace with any temperature
        return shifted - (shifted - factor)

    def arguments(self) -> tuple[int, int, int, float]:
        """The fields in order, as the torch.library ops take them."""
        return self.vocab_start, self.vocab_size, self.ignore_index, self.temperature

    def columns(self, logits: Tensor) -> int:
        """Columns of this shard inside the true vocabulary."""
        return max(0, min(logits.shape[1], self.vocab_size - self.vocab_start))

    def stray(self, labels: Tensor) -> Tensor:
        """[T] bool: labels that are neither in the vocabulary nor the ignore index."""
        return ((labels < 0) | (labels >= self.vocab_size)) & (labels != self.ignore_index)


@dataclass(frozen=True)
class KernelCall:
    """One Triton launch.  The offline gates compile the same object that training launches."""

    kernel: Callable
    grid: tuple[int, ...]
    args: tuple
    options: dict = field(default_factory=dict)

    def launch(self) -> None:
        if all(self.grid):
            with torch.cuda.device_of(self.args[0]):  # a tensor may live on another GPU than the current one
                self.kernel[self.grid](*self.args, **self.options)

    def compile(self):
        """Compile without launching (no GPU needed under a stand-in driver)."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.options)


def vector_width(logits: Tensor) -> int:
    """Elements in 16 bytes, the widest load of a thread."""
    return 16 // logits.element_size()


def shared_vector(logits: Tensor, out: Tensor) -> int:
    """Elements per vector when `logits` are read and `out` is written side by side; ValueError where their rows are not aligned alike."""
    width = max(vector_width(logits), vector_width(out))
    if logits.dtype != out.dtype:
        for name, x in (("logits", logits), ("out", out)):
            if x.stride(0) % width or x.data_ptr() % 16:
                raise ValueError(
                    f"{name} rows have stride {x.stride(0)} and start at byte {x.data_ptr() % 16} of 16; logits in {logits.dtype} with a gradient in "
                    f"{out.dtype} need rows that start at 16-byte boundaries and strides that are multiples of {width}"
                )
    return width


def aligned_rows(logits: Tensor) -> tuple[Tensor, int]:
    """The same rows seen from the 16-byte boundary at or before their first element, and the distance in elements.

    A slice such as logits[1:] of an odd vocabulary begins between boundaries; Triton widens loads only from an aligned pointer.
    """
    lead = logits.data_ptr() % 16 // logits.element_size()
    if lead == 0:
        return logits, 0
    if logits.storage_offset() < lead:  # memory handed over by another library may itself begin between boundaries
        raise ValueError(
            f"logits begin {lead} elements past a 16-byte boundary at the very start of their storage; pass logits.clone() instead"
        )
    return logits.as_strided((1,), (1,), logits.storage_offset() - lead), lead


def row_stride_like(logits: Tensor) -> int:
    """Smallest row stride that keeps each row of a fresh [T, V] tensor at the same distance from a boundary as in `logits`."""
    width = logits.shape[1]
    return width + (logits.stride(0) - width) % vector_width(logits)


def empty_like_rows(logits: Tensor) -> Tensor:
    """An uninitialised [T, V] tensor whose rows start at the same distance from a 16-byte boundary as those of `logits`."""
    rows, width = logits.shape
    stride = row_stride_like(logits)
    lead = logits.data_ptr() % 16 // logits.element_size()
    return logits.new_empty(lead + rows * stride).as_strided((rows, width), (stride, 1), lead)
