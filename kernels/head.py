"""The output head on one chunk of tokens after another, in one workspace: logits, their gradient, and the sums of dX, dW, db.

T tokens, n of them in a chunk, V columns of this shard, H hidden.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_plugin.kernels.gemm import project
from megatron_plugin.kernels.layout import Shard

ALIGN = {"cpu": 1, "cuda": 8}  # columns: 16 bytes in half precision, the granule of a GPU's fast GEMMs
SOFTCAP_BLOCK = {"cuda": 2**25, "cpu": 2**18}  # elements of its fp32 temporary


def workspace_row_bytes(columns: int, logits_dtype: torch.dtype, dtype: torch.dtype, softcap: float | None) -> int:
    """Bytes that one token takes in the workspace of `Projection`, gradient included."""
    separate = logits_dtype != dtype or softcap is not None
    return columns * (logits_dtype.itemsize + (dtype.itemsize if separate else 0))


def _rows(count: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[count, columns], each row at a 16-byte boundary, as the row kernels need where logits and gradient differ in dtype."""
    vector = 16 // dtype.itemsize
    return like.new_empty(count, -(-columns // vector) * vector, dtype=dtype)[:, :columns]


class Columns(NamedTuple):
    """How much of a shard [V, H] takes part: the rows behind the true vocabulary (Megatron's padding) may hold anything, NaN too."""

    real: int
    """Columns inside the vocabulary."""
    wide: int
    """Columns that the GEMMs see, in whole ALIGN as far as there are so many; the gradient of those that are not real is 0."""

    @classmethod
    def of(cls, weight: Tensor, shard: Shard) -> "Columns":
        real, align = shard.columns(weight.t()), ALIGN.get(weight.device.type, ALIGN["cuda"])
        return cls(real, min(weight.shape[0], -(-real // align) * align))


class HiddenGradient:
    """dX [n, H] = dz W over the real columns.  Their gradient is exactly 0 behind them, but 0 * NaN is not.

    Where the GEMM is wider, its last columns enter apart, with a clean copy of their few rows of the weight; first, since what is added to
    is rounded once more.
    """

    def __init__(self, weight: Tensor, columns: Columns) -> None:
        self._weight, self._last = weight[: columns.wide], None
        if columns.wide > columns.real:
            align = min(columns.wide, ALIGN.get(weight.device.type, ALIGN["cuda"]))
            self._weight, self._last = self._weight.split([columns.wide - align, align])
            self._last = self._last.clone()
            self._last[columns.real - columns.wide :] = 0.0

    def __call__(self, dz: Tensor, out: Tensor | None = None) -> Tensor:
        if self._last is None:
            return torch.mm(dz, self._weight, out=out)
        first, last = dz.split([len(self._weight), len(self._last)], 1)
        return torch.mm(last, self._last, out=out).addmm_(first, self._weight)


class Projection:
    """z = cap tanh((x W^T + bias) / cap) of chunks of at most `size` tokens, and the gradient by x W^T; one buffer, two where they differ.

    The gradient takes the place of the logits.  Logits in a dtype of their own keep theirs, and with a softcap the values under it are kept
    for its derivative: from z in bf16, 1 - (z / cap)^2 is 20 % off at z = 0.99 cap; from x W^T 1 %.  V: `columns.wide` of the shard.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, softcap: float | None, columns: Columns, logits_dtype: torch.dtype, size: int, *, gradient: bool
    ) -> None:
        self.weight, self.bias, self.softcap = weight[: columns.wide], None if bias is None else bias[: columns.wide], softcap
        self._real = columns.real
        room = lambda dtype: _rows(size, weight.shape[0], weight, dtype)[:, : columns.wide]  # noqa: E731  as far apart as without the padding cut
        self._logits = self._raw = self._gradient = room(logits_dtype)
        if gradient and logits_dtype != weight.dtype:
            self._gradient = room(weight.dtype)
        elif gradient and softcap is not None:
            self._raw = room(logits_dtype)

    def logits(self, x: Tensor) -> Tensor:
        """z [n, V] of x [n, H]; valid until the next chunk, or until its gradient is written."""
        raw, z = self._raw[: x.shape[0]], self._logits[: x.shape[0]]
        if self.bias is not None and raw.dtype == x.dtype:
            torch.addmm(self.bias, x, self.weight.t(), out=raw)  # rounded once
        else:
            project(x, self.weight, raw)
            if self.bias is not None:
                raw.add_(self.bias)
        if self.softcap is not None:
            for tile in self._tiles(z):
                z[tile] = self._bent(raw[tile]).mul_(self.softcap)
        return z

    def room(self, n: int) -> Tensor:
        """[n, V] for dF/dz, where the row kernels write it."""
        return self._gradient[:n]

    def gradient(self, n: int) -> Tensor:
        """dF/d(x W^T + bias) [n, V] from the dF/dz in `room`, in place."""
        whole = self._gradient[:n]
        if self.softcap is not None:
            dz, raw, z = (x[:n, : self._real] for x in (whole, self._raw, self._logits))  # behind them dz is 0, and raw may be NaN
            for tile in self._tiles(dz):
                bent = z[tile].to(self._work) / self.softcap if self._raw is self._logits else self._bent(raw[tile])
                dz[tile] = bent.square_().neg_().add_(1.0).mul_(dz[tile])
        return whole

    def _bent(self, raw: Tensor) -> Tensor:
        return raw.to(self._work).div(self.softcap).tanh_()

    @property
    def _work(self) -> torch.dtype:
        return torch.promote_types(self._logits.dtype, torch.float32)

    def _tiles(self, z: Tensor) -> Iterator[slice]:
        step = max(1, SOFTCAP_BLOCK.get(z.device.type, SOFTCAP_BLOCK["cuda"]) // max(z.shape[1], 1))
        return (slice(begin, begin + step) for begin in range(0, z.shape[0], step))
