"""The walk of both hidden-in ops over their chunks: hidden states in, sums of gradients out.

T tokens of the call, S of them in this rank's slice, n in a chunk, V columns of this shard, H hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_plugin.kernels.chunks import Chunk
from megatron_plugin.kernels.exchange import Exchange, Pending
from megatron_plugin.kernels.head import Columns, HiddenGradient, Projection
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.main_grad import MainGrad
from megatron_plugin.kernels.weight_grad import InPlace, own_weight_grad


@dataclass(frozen=True)
class Sweep:
    """What forward and backward of one call share."""

    chunks: list[Chunk]
    shard: Shard
    logits_dtype: torch.dtype
    softcap: float | None = None
    exchange: Exchange = field(default_factory=Exchange)
    masked_inside: bool = True
    """Whether a chunk may hold masked tokens: their hidden states are then zeroed, for 0 x NaN would reach dW."""
    main_grad: MainGrad | None = None
    """Where dW goes; None: into a tensor of its own."""

    def projection(self, weight: Tensor, bias: Tensor | None, *, gradient: bool) -> Projection:
        size = max((chunk.size for chunk in self.chunks), default=0)
        return Projection(weight, bias, self.softcap, Columns.of(weight, self.shard), self.logits_dtype, size, gradient=gradient)

    def batches(self, hidden_SH: Tensor, labels_T: Tensor) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
        """(chunk, its hidden states [n, H], its labels [n]).  The next chunk's hidden states travel while this one computes."""
        coming: Pending | None = None
        for chunk, following in zip(self.chunks, [*self.chunks[1:], None], strict=False):
            x = (coming or self.exchange.gather_hidden(hidden_SH[chunk.rows]))()
            coming = None if following is None else self.exchange.gather_hidden(hidden_SH[following.rows])
            x = x if chunk.kept is None else x[chunk.kept]
            labels = labels_T[chunk.tokens]
            if self.masked_inside:
                x = torch.where((labels != self.shard.ignore_index)[:, None], x, 0.0)
            yield chunk, x, labels


class Gradients:
    """dX [S, H], dW [V, H] and db [V] of the chunks so far; those that nobody needs are None and cost nothing.  dW and db are 0 in the padding.

    dX's sum over the tensor-parallel ranks is under way while the dW GEMM runs, one chunk at a time.
    """

    def __init__(
        self, sweep: Sweep, hidden_SH: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]
    ) -> None:
        dx, dw, db = needed
        columns, self._exchange = Columns.of(weight, sweep.shard), sweep.exchange
        self._product, self._wide = HiddenGradient(weight, columns), columns.wide
        self._dx = torch.zeros_like(hidden_SH, memory_format=torch.contiguous_format) if dx else None
        self._db = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32)) if db else None
        self._db_dtype = None if bias is None else bias.dtype
        self._own = own_weight_grad(weight, len(sweep.chunks), columns.wide) if dw and sweep.main_grad is None else None
        self._dw = InPlace(sweep.main_grad.target()[: columns.wide]) if dw and sweep.main_grad is not None else self._own
        self._arriving: tuple[slice | Tensor, Pending] | None = None

    def add(self, chunk: Chunk, x: Tensor, dz: Tensor, few: Tensor | None = None) -> None:
        """From dz [n, V] and x [n, H] of a chunk.  few: only these of its tokens, by index, enter the GEMMs; the rest count as 0."""
        if few is not None:
            x, dz = x[few], dz[few]
        if self._dx is not None:
            self._start_dx(chunk, dz, few)
        if self._dw is not None:
            self._dw.add(dz, x)
        if self._db is not None:
            self._db[: self._wide] += dz.sum(0, dtype=self._db.dtype)

    def _start_dx(self, chunk: Chunk, dz: Tensor, few: Tensor | None) -> None:
        rows, kept = chunk.rows, chunk.kept
        if few is None and kept is None and isinstance(rows, slice) and self._exchange.slices == 1:
            dx = self._product(dz, out=self._dx[rows])  # in its place at once; its sum is formed there too
        else:
            dx = self._product(dz)
        if self._exchange.slices > 1:
            kept = few if kept is None else kept if few is None else kept[few]
            if kept is not None:
                dx = dx.new_zeros(chunk.gathered, dx.shape[1]).index_copy_(0, kept, dx)
        elif few is not None:
            rows = few + rows.start if isinstance(rows, slice) else rows[few]
        self._land()
        self._arriving = rows, self._exchange.reduce_dx(dx)

    def _land(self) -> None:
        if self._arriving is not None:
            rows, pending = self._arriving
            dx = pending()
            if not isinstance(rows, slice) or dx.data_ptr() != self._dx[rows].data_ptr():
                self._dx[rows] = dx
            self._arriving = None

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX, dW, db), summed over all chunks; dW is None where it went into main_grad."""
        self._land()
        return (
            self._dx,
            None if self._own is None else self._own.result(),
            None if self._db is None else self._db.to(self._db_dtype),
        )
