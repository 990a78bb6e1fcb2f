"""The frozen reference policy: a second set of weights on the host, exchanged with the model's own for as long as it is scored."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Reference"]


class Reference:
    """The weights that the model had when this was made.

    Host memory: one copy of this rank's parameters and buffers, pinned where there is a GPU; on the device no more than the largest of them
    while they are exchanged.  Both sets are only ever copied, so after a swap every bit of the model is what it was."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """chunks: this rank's model chunks, bare or in DistributedDataParallel; they keep their storage, which gradient and optimizer views into."""
        # not chunk.buffers(): a DistributedDataParallel of megatron-core keeps its gradient buffers under that name
        tensors = [x for chunk in chunks for x in (*chunk.parameters(), *dict(chunk.named_buffers()).values())]
        self._live = list({id(x): x for x in tensors}.values())
        self._kept = [_host_copy(x) for x in self._live]
        self._swapped = 0  # of the first tensors the reference is in the model and the model's own on the host
        self.bytes = sum(x.numel() * x.element_size() for x in self._kept)
        """Of one set; a swap moves twice as many, and so does the swap back."""
        self.seconds: list[float] = []
        """Of each exchange since the start: in, out, in, out, ..."""

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model computes with the reference weights; afterwards, also after an error, with its own.

        Only for forwards without gradient: a backward through weights that were exchanged meanwhile is an error of autograd's.  With
        overlap_param_gather finish the parameter gather first (the trainer does not use it).  RuntimeError inside itself."""
        if self._swapped:
            raise RuntimeError("the reference weights are in the model already: swapped_in() inside swapped_in(); leave the first one before the next")
        try:
            self._exchange(len(self._live))
            yield
        finally:
            self._exchange(self._swapped, back=True)

    @torch.no_grad()
    def _exchange(self, count: int, *, back: bool = False) -> None:
        """Exchange the first `count` tensors with the host's; stopped by an error, `_swapped` says how many are done."""
        start, on_device = time.perf_counter(), False
        for i in reversed(range(count)) if back else range(count):
            live, kept = self._live[i], self._kept[i]
            own = live.clone()
            live.copy_(kept, non_blocking=True)
            kept.copy_(own, non_blocking=True)  # behind the copy above in the same stream
            self._swapped += -1 if back else 1
            on_device |= live.is_cuda
        if on_device:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)


def _host_copy(x: Tensor) -> Tensor:
    kept = torch.empty_like(x, device="cpu", requires_grad=False, pin_memory=x.is_cuda)
    return kept.copy_(x.detach())
