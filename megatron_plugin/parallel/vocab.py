"""Tensor parallelism of the vocabulary: which columns a rank holds, and the one collective that joins the ranks' statistics."""

from functools import lru_cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.token_stats import Gather, one_shard


def all_gather(gathered: Tensor, mine: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `gathered` with every rank's `mine`, in rank order, under the name that this torch does not warn about."""
    if hasattr(dist, "all_gather_single"):
        dist.all_gather_single(gathered, mine, group=group)
    else:  # before torch 2.13
        dist.all_gather_into_tensor(gathered, mine, group=group)


@lru_cache(maxsize=64)
def _layout_row(shard: Shard, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 4]: the columns this rank holds, exact in fp32 up to 16.7 M.  Kept, because filling it waits for the GPU."""
    return torch.tensor([[shard.vocab_start, columns, shard.vocab_size, 0]], dtype=dtype, device=device)


def gather_partials(group: dist.ProcessGroup, shard: Shard, columns: int, partials_T4: Tensor) -> Tensor:
    """[T, 4] partials of this rank -> [R, T, 4] of all ranks, by one all-gather of 16 bytes per token and rank.

    Every rank goes on to merge the same numbers in rank order, so all of them hold the same bits; the backward needs no collective.  One more
    row travels along and says which columns the rank holds: shards that leave a gap or overlap raise ValueError on every rank (on a
    GPU, where looking would stall the queue, they make every statistic NaN).
    """
    ranks = dist.get_world_size(group)
    mine = torch.cat((partials_T4, _layout_row(shard, columns, partials_T4.dtype, partials_T4.device)))
    gathered = mine.new_empty((ranks * mine.shape[0], 4))
    all_gather(gathered, mine, group)
    gathered_RT4 = gathered.view(ranks, -1, 4)
    start_R, columns_R, size_R, _ = gathered_RT4[:, -1].long().unbind(-1)  # integers: a floating-point cumsum is not deterministic on CUDA
    ends_R = columns_R.cumsum(0)
    fits = (start_R == ends_R - columns_R).all() & (ends_R[-1] >= size_R).all() & (size_R == size_R[0]).all()
    if not partials_T4.is_cuda and not torch.compiler.is_compiling() and not fits:
        held = ", ".join(f"[{int(a)}, {int(a + n)})" for a, n in zip(start_R, columns_R, strict=True))
        raise ValueError(
            f"the shards of the {ranks} tensor-parallel ranks hold columns {held}, which do not tile the vocabulary [0, {int(size_R.max())}): "
            "equal shards need no vocab_start; uneven ones need each rank's own vocab_start and the same vocab_size on every rank"
        )
    return gathered_RT4[:, :-1].where(fits, torch.nan)


def gather_over(group: dist.ProcessGroup | None, shard: Shard, columns: int) -> Gather:
    """What an op does between its two passes."""
    return one_shard if group is None or dist.get_world_size(group) == 1 else partial(gather_partials, group, shard, columns)


def shard_of(
    columns: int, group: dist.ProcessGroup | None, *, vocab_start: int | None, vocab_size: int | None, temperature: float, ignore_index: int
) -> Shard:
    """The shard that `columns` logits columns of this rank are.

    Without vocab_start the shards are equal and in rank order (Megatron's split).  Uneven shards need vocab_start and vocab_size on
    every rank.  ValueError where the numbers cannot describe one vocabulary.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    if vocab_start is not None and vocab_size is None:
        raise ValueError(
            f"vocab_start={vocab_start} was given without vocab_size: with uneven shards this rank cannot know where the vocabulary "
            "ends; pass vocab_size=<true vocabulary> on every rank"
        )
    held = ranks * columns if vocab_start is None else vocab_start + columns if ranks == 1 else None
    vocab_size = ranks * columns if vocab_size is None else vocab_size  # without it the shards are equal: no vocab_start
    vocab_start = rank * columns if vocab_start is None else vocab_start
    if vocab_size <= 0 or (held is not None and vocab_size > held) or (ranks == 1 and vocab_start != 0):
        raise ValueError(
            f"vocab_size={vocab_size} with vocab_start={vocab_start} does not fit {columns} logits columns on each of {ranks} tensor-parallel "
            "rank(s): pass the true vocabulary (at most the padded one), and tp_group if the logits are one shard"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not positive; logits are divided by it")
    return Shard(vocab_start, vocab_size, ignore_index, float(temperature))


def all_reduce_sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of a small tensor over a group, on the device its backend works on.  Returns a new tensor on the input's device."""
    if group is None or dist.get_world_size(group) == 1:
        return values.clone()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    total = values.to(device, copy=True)
    dist.all_reduce(total, group=group)
    return total.to(values.device)
