"""Tensor parallelism of hidden states: sequence-parallel slices gathered chunk by chunk, dX summed while other work goes on."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor

from megatron_plugin.kernels.exchange import Exchange, Pending
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.parallel.vocab import gather_over

__all__ = ["exchange_over"]


def exchange_over(group: dist.ProcessGroup | None, shard: Shard, columns: int, *, sequence_parallel: bool) -> Exchange:
    """What a chunk exchanges over `group`: 16 bytes per token and rank of statistics, and the sum of dX.

    Plain tensor parallelism all-reduces dX [n, H] in place.  Sequence parallelism gathers hidden states [n / R, H] -> [n, H] and
    reduce-scatters dX back, never more than a chunk of either.  All transfers but that of the statistics run beside the compute queue.
    """
    if group is None or dist.get_world_size(group) == 1:
        return Exchange()
    gather = gather_over(group, shard, columns)
    if not sequence_parallel:
        return Exchange(1, gather, reduce_dx=partial(_start_all_reduce, group))
    return Exchange(dist.get_world_size(group), gather, partial(_start_all_gather, group), partial(_start_reduce_scatter, group))


def _start_all_reduce(group: dist.ProcessGroup, x: Tensor) -> Pending:
    return _pending(dist.all_reduce(x, group=group, async_op=True), x)


def _start_all_gather(group: dist.ProcessGroup, x: Tensor) -> Pending:
    out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    # the names of torch 2.13, which warns about the older ones
    start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return _pending(start(out, x.contiguous(), group=group, async_op=True), out)


def _start_reduce_scatter(group: dist.ProcessGroup, x: Tensor) -> Pending:
    out = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    start = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return _pending(start(out, x, group=group, async_op=True), out)


def _pending(work: dist.Work, result: Tensor) -> Pending:
    def wait() -> Tensor:
        work.wait()
        return result

    return wait
