"""dW [V, H] = sum over chunks of dz^T x, in at least fp32 until the last chunk.

Each class takes the chunks by `add(dz [n, C], x [n, H])` and gives the gradient by `result()`: C of the V rows, zeros from there on.
"""

import torch
from torch import Tensor

from megatron_plugin.kernels.gemm import accumulate_, assign_, vocabulary_blocks


class InPlace:
    """Into a tensor that already holds a gradient (Megatron's main_grad): no other [V, H] tensor."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def add(self, dz: Tensor, x: Tensor) -> None:
        accumulate_(self.total, dz, x)


class Own:
    """A gradient of its own in the weight's dtype.  fp32 and fp64 add up in place; half precision through an fp32 sum, cast at the end.

    A single chunk needs no sum: the GEMM accumulates in fp32 and rounds once.
    """

    def __init__(self, weight: Tensor, chunks: int, columns: int) -> None:
        self._weight, self._columns = weight, columns
        self._cast = weight.dtype.itemsize < 4 and chunks > 1
        self._result = None if self._cast else _zero_from(weight, columns if chunks else 0)
        self.total = weight.new_empty(columns, weight.shape[1], dtype=torch.float32) if self._cast else self._result[:columns]
        self._first = True

    def add(self, dz: Tensor, x: Tensor) -> None:
        (assign_ if self._first else accumulate_)(self.total, dz, x)
        self._first = False

    def result(self) -> Tensor:
        if self._cast:
            self._result = _zero_from(self._weight, self._columns)
            self._result[: self._columns].copy_(self.total)
        return self._result


class OwnSplit:
    """`Own` for half precision on the CPU, where an fp32 sum would be larger than everything else together.

    The sum is kept as two half-precision numbers, value and remainder: 16 bits of mantissa in bf16, and the value is the gradient that is
    handed out.  The first chunk's product is rounded to the value alone and the last one needs no remainder: two chunks cost no memory beyond
    the result.  Products are added in fp32.
    """

    def __init__(self, weight: Tensor, chunks: int, columns: int) -> None:
        self._result = _zero_from(weight, columns if chunks else 0)
        self.value = self._result[:columns]
        self.remainder = None
        self._chunks, self._seen = chunks, 0

    def add(self, dz: Tensor, x: Tensor) -> None:
        self._seen += 1
        last = self._seen == self._chunks
        if self._seen == 1:
            torch.mm(dz.t(), x, out=self.value)
        elif last and self.remainder is None:
            self.value.addmm_(dz.t(), x)
        else:
            self._add_blocks(dz, x, last)

    def _add_blocks(self, dz: Tensor, x: Tensor, last: bool) -> None:
        before, self.remainder = self.remainder, torch.empty_like(self.value) if self.remainder is None else self.remainder
        room = None
        for block in vocabulary_blocks(self.value):
            value, remainder = self.value[block], self.remainder[block]
            room = torch.empty_like(value, dtype=torch.float32) if room is None else room  # fresh memory for each costs a third more
            total = room[: len(value)].copy_(value)
            if before is not None:
                total.add_(remainder)
            accumulate_(total, dz[:, block], x)
            value.copy_(total)
            if not last:
                remainder.copy_(total.sub_(value))

    def result(self) -> Tensor:
        return self._result


def _zero_from(weight: Tensor, row: int) -> Tensor:
    """A tensor like `weight`, contiguous: uninitialised up to `row`, 0 from there on."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    result[row:].zero_()
    return result


def own_weight_grad(weight: Tensor, chunks: int, columns: int) -> Own | OwnSplit:
    """A gradient of its own for `weight` [V, H], of so many chunks, in its first `columns` rows."""
    split = weight.device.type == "cpu" and weight.dtype.itemsize < 4
    return (OwnSplit if split else Own)(weight, chunks, columns)
