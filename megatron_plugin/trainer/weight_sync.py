"""The trainer's weights into the rollout engines: Hugging Face tensors, gathered one at a time, sent bucket by bucket."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.hooks.weights import hf_tensors
from megatron_plugin.rollout.fleet import Fleet
from megatron_plugin.rollout.transfer import Transport, send_weights
from megatron_plugin.trainer.leaders import Leaders

__all__ = ["WeightSync"]


class WeightSync:
    """Sends what `chunks` hold.  Every rank of the job calls `send` together."""

    def __init__(self, chunks: list, leaders: Leaders, *, vocab_size: int, dtype: torch.dtype, bucket_bytes: int, checksums: bool):
        self.chunks, self.leaders, self.vocab_size, self.dtype = chunks, leaders, vocab_size, dtype
        self.bucket_bytes, self.checksums = bucket_bytes, checksums
        self.seconds = 0.0
        """Spent in `send` since whoever reports it set this to 0."""

    def send(self, fleet: Fleet | None, transport: Transport | None, version: int) -> None:
        """The weights as they are now, as `version`, to those engines of this leader's `fleet` (None on other ranks) that have an older one.

        Engines lost on the way are DEAD in their fleet.  What fails on one leader (an engine refuses, no room for a bucket, no network) ends every rank; no engine is left with half of them."""
        start, tensors, failure = time.perf_counter(), self._tensors(), None
        try:
            if fleet is None:
                for _ in tensors:  # the gathering is collective
                    pass
            else:
                waiting = [engine for engine in fleet.engines if engine.weight_version != version]
                report = send_weights(waiting, tensors, version=version, transport=transport, bucket_bytes=self.bucket_bytes,
                                      checksums=self.checksums, dtype=self.dtype)  # fmt: skip
                for engine in report.lost:
                    fleet.mark_lost(engine, "lost during a weight update")
        except Exception as error:
            failure = error
            for _ in tensors:  # to the end, where it is not there yet: the other ranks are gathering
                pass
        self.leaders.raise_first(failure)
        self.seconds += time.perf_counter() - start

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        # one leader: to it alone.  Several: to every rank, one tensor at a time, because each leader sends to its own engines
        to = self.leaders.rank if self.leaders.count == 1 and self.leaders.group.size() == dist.get_world_size() else None
        return hf_tensors(self.chunks, vocab_size=self.vocab_size, to=to)
