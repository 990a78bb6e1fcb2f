"""Context parallelism: each of C ranks holds two of 2C pieces of every sequence, and keys and values of all of them where attention needs them.

The pieces lie zig-zag, as in megatron-core's get_batch_on_this_cp_rank: rank r has pieces r and 2C-1-r.  Under a causal mask the first piece
attends to little and the last to everything, so each rank gets one cheap piece and one dear one.

    C = 2, s = 8       rank 0: tokens 0 1 | 6 7        rank 1: tokens 2 3 | 4 5
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.parallel.vocab import all_gather

__all__ = ["context_gather", "context_slice"]


def context_slice(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part of `x` along `dim`: [..., s, ...] -> [..., s/C, ...], a new tensor; `x` itself where there is one rank or no group.

    For batches (tokens, labels, positions, masks: dim=1) and for the queries of an attention mask [b, 1, s, s] (dim=2; its keys stay whole).
    Differentiable; no communication.  ValueError when 2C does not divide s."""
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1:
        return x
    if x.shape[dim] % (2 * ranks):
        raise ValueError(
            f"got {x.shape[dim]} tokens along dim {dim} of {list(x.shape)}, expected a multiple of {2 * ranks}: each of {ranks} context-parallel "
            "ranks holds two equal pieces; pad the rows to such a length, or use fewer context-parallel ranks"
        )
    pieces, rank = x.chunk(2 * ranks, dim), dist.get_rank(group)
    return torch.cat((pieces[rank], pieces[-1 - rank]), dim)


def context_gather(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """The whole of what `context_slice` cut: [..., s/C, ...] -> [..., s, ...] in the order of the tokens, the same on every rank.

    One all-gather.  The backward is one reduce-scatter: the gradient of a token is the sum of what all ranks did with it.  ValueError when
    the slice cannot be two equal pieces."""
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1:
        return x
    if x.shape[dim] % 2:
        raise ValueError(f"got a slice of {x.shape[dim]} tokens along dim {dim} of {list(x.shape)}, expected an even number: two equal pieces")
    whole = _Gather.apply(x.movedim(dim, 0).contiguous(), group)
    return whole.movedim(0, dim).contiguous()


class _Gather(torch.autograd.Function):
    """[s/C, ...] -> [s, ...], the pieces put back in order."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ranks = group, dist.get_world_size(group)
        gathered = x.new_empty(ranks * x.shape[0], *x.shape[1:])
        all_gather(gathered, x, group)
        pieces = gathered.chunk(2 * ranks)  # 0, 2C-1, 1, 2C-2, ...: the first and second piece of each rank
        return torch.cat((*pieces[::2], *reversed(pieces[1::2])))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ranks = dist.get_world_size(ctx.group)
        pieces = grad.chunk(2 * ranks)
        scattered = torch.cat([piece for rank in range(ranks) for piece in (pieces[rank], pieces[-1 - rank])])
        mine = grad.new_empty(grad.shape[0] // ranks, *grad.shape[1:])
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # torch 2.13 warns about the older name
        reduce_scatter(mine, scattered, group=ctx.group)
        return mine, None
