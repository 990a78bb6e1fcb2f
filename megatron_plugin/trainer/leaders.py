"""Who samples for whom.  One rank, the leader, talks to engines for the ranks it serves; all others wait for it in gloo.

Generation takes minutes and no GPU of ours: a rank parked in an NCCL collective meanwhile would trip its watchdog.  All exchange here is in
gloo groups of their own, whose timeout is as long as generation may take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_plugin.hooks.mcore import groups

__all__ = ["Leaders", "RemoteError"]

T = TypeVar("T")


class RemoteError(RuntimeError):
    """What failed on another rank, in its words."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class Leaders:
    """Data-parallel replicas shared out over at most `engines` leaders, in order; every rank of the job makes one, at the same time."""

    def __init__(self, engines: int, *, timeout_s: float):
        ours, timeout = groups(), timedelta(seconds=timeout_s)
        self.replicas = ours.dp.size()
        self.count = min(engines, self.replicas)
        self.replica = ours.dp.rank()
        self.world = dist.new_group(backend="gloo", timeout=timeout)
        # of the replica's ranks, the one that holds the head: tp 0, cp 0, last stage
        order = (self.replica, ours.tp.rank(), ours.cp.rank(), ours.pp.size() - 1 - ours.pp.rank())
        places: list[tuple[int, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(places, order, group=self.world)
        self.index = self.leader_of(self.replica)
        for leader in range(self.count):  # every rank makes every group: torch requires it
            served = [rank for rank, place in enumerate(places) if self.leader_of(place[0]) == leader]
            group = dist.new_group(served, backend="gloo", timeout=timeout)
            if leader == self.index:
                self.group, self.rank = group, min(served, key=places.__getitem__)
        self.leads = dist.get_rank() == self.rank

    def leader_of(self, replica: int) -> int:
        return replica * self.count // self.replicas

    def served(self) -> list[int]:
        """Data-parallel replicas of this rank's leader."""
        return [r for r in range(self.replicas) if self.leader_of(r) == self.index]

    def from_leader(self, value: T | None) -> T:
        """The leader's value, on every rank it serves."""
        box = [value]
        dist.broadcast_object_list(box, src=self.rank, group=self.group)
        return box[0]

    def everyone(self, value: T) -> list[T]:
        """`value` of every rank, on every rank."""
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, value, group=self.world)
        return said

    def added(self, counts: Counter[str]) -> Counter[str]:
        """The sum of `counts` over all ranks, on every rank; sums of 0 and below are in it, which `+` would drop."""
        total: Counter[str] = Counter()
        for each in self.everyone(counts):
            total.update(each)
        return total

    def on_leaders(self, act: Callable[[], T]) -> T | None:
        """What `act` returns, on leaders; None elsewhere.  Where it raises on any leader, every rank raises, so that none is left waiting."""
        result, own = None, None
        if self.leads:
            try:
                result = act()
            except Exception as error:
                own = error
        self.raise_first(own)
        return result

    def raise_first(self, own: Exception | None) -> None:
        """Every rank says what failed here, if anything; all raise if any did, the one that knows more its own error."""
        failure = None if own is None else (f"{type(own).__name__}: {own}", getattr(own, "exit_code", 1))
        said = [found for found in self.everyone(failure) if found]
        if own is not None:
            raise own
        if said:
            raise RemoteError(*said[0])
