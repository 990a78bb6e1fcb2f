"""The output head on one chunk of tokens after another, in one workspace: logits, their gradient, and the sums of dX, dW, db.

T tokens, n of them in a chunk, V columns of this shard, H hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_plugin.kernels.gemm import project

SOFTCAP_BLOCK = {"cuda": 2**25, "cpu": 2**18}  # elements of its fp32 temporary


def workspace_row_bytes(columns: int, logits_dtype: torch.dtype, dtype: torch.dtype, softcap: float | None) -> int:
    """Bytes that one token takes in the workspace of `Projection`, gradient included."""
    separate = logits_dtype != dtype or softcap is not None
    return columns * (logits_dtype.itemsize + (dtype.itemsize if separate else 0))


def _rows(count: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[count, columns], each row at a 16-byte boundary, as the row kernels need where logits and gradient differ in dtype."""
    vector = 16 // dtype.itemsize
    return like.new_empty(count, -(-columns // vector) * vector, dtype=dtype)[:, :columns]


class Projection:
    """z = cap tanh((x W^T + bias) / cap) of chunks of at most `size` tokens, and the gradient by x W^T; one buffer, two where they differ.

    The gradient takes the place of the logits.  Logits in a dtype of their own keep theirs, and with a softcap the values under it are kept
    for its derivative: from z in bf16, 1 - (z / cap)^2 is 20 % off at z = 0.99 cap; from x W^T 1 %.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, softcap: float | None, logits_dtype: torch.dtype, size: int, *, gradient: bool
    ) -> None:
        self.weight, self.bias, self.softcap = weight, bias, softcap
        V, differ = weight.shape[0], logits_dtype != weight.dtype
        self._logits = self._raw = self._gradient = _rows(size, V, weight, logits_dtype)
        if gradient and differ:
            self._gradient = _rows(size, V, weight, weight.dtype)
        elif gradient and softcap is not None:
            self._raw = _rows(size, V, weight, logits_dtype)

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
        dz = self._gradient[:n]
        if self.softcap is not None:
            for tile in self._tiles(dz):
                if self._raw is self._logits:
                    bent = self._logits[:n][tile].to(self._work) / self.softcap
                else:
                    bent = self._bent(self._raw[:n][tile])
                dz[tile] = bent.square_().neg_().add_(1.0).mul_(dz[tile])
        return dz

    def _bent(self, raw: Tensor) -> Tensor:
        return raw.to(self._work).div(self.softcap).tanh_()

    @property
    def _work(self) -> torch.dtype:
        return torch.promote_types(self._logits.dtype, torch.float32)

    def _tiles(self, z: Tensor) -> Iterator[slice]:
        step = max(1, SOFTCAP_BLOCK.get(z.device.type, SOFTCAP_BLOCK["cuda"]) // z.shape[1])
        return (slice(begin, begin + step) for begin in range(0, z.shape[0], step))
