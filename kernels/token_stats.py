"""Two-pass op: log-probability of each label and entropy of each row, differentiable, for any objective.

    stats kernel (one read) -> merge over shards -> [T] statistics -> the caller's loss -> grad kernel (one read, one write)

Saved for the backward: the logits and four numbers per token.  The log-softmax is never stored.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_plugin.kernels import shard_ops
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.partials import finish_rows, merge_partials

Gather = Callable[[Tensor], Tensor]
"""Partials [T, 4] of this shard -> [R, T, 4] of all shards, in shard order."""


class TokenStats(NamedTuple):
    """Per-token statistics of the softmax over the whole vocabulary.  Shapes are those of the labels; fp32 (fp64 for fp64 logits)."""

    logp: Tensor
    """log-probability of the label, nats.  0 for a masked row, NaN for a label outside the vocabulary."""
    entropy: Tensor
    """Shannon entropy of the row, nats."""
    lse: Tensor
    """log-partition, nats: logsumexp(logits / temperature).  An output; nothing is computed from it."""


def one_shard(partials_T4: Tensor) -> Tensor:
    """The gather of a vocabulary that is not split."""
    return partials_T4[None]


def as_rows(logits: Tensor) -> Tensor:
    """logits [..., V] as [T, V] rows that kernels can walk: contiguous columns, no two rows in the same memory.  A view where possible."""
    logits_TV = logits.reshape(-1, logits.shape[-1])
    if logits_TV.stride(-1) != 1 or logits_TV.stride(0) < logits_TV.shape[1]:  # transposed, or rows that overlap (expand)
        return logits_TV.contiguous()
    return logits_TV


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor, shard: Shard, gather: Gather, overwrite_logits: bool):
        partials_T4 = shard_ops.stats(logits_TV, labels_T, *shard.arguments())
        dtype = partials_T4.dtype
        *stats, rows_T4 = finish_rows(merge_partials(gather(partials_T4)), labels_T, shard, dtype)
        ctx.save_for_backward(logits_TV, labels_T, rows_T4.to(dtype))
        ctx.shard, ctx.overwrite_logits = shard, overwrite_logits
        ctx.set_materialize_grads(False)
        return tuple(x.to(dtype) for x in stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_stats):
        logits_TV, labels_T, rows_T4 = ctx.saved_tensors
        zeros_T = torch.zeros_like(rows_T4[:, 0])
        grads_T3 = torch.stack([zeros_T if d is None else d for d in d_stats], -1)
        op = shard_ops.grad_ if ctx.overwrite_logits else shard_ops.grad
        dlogits_TV = op(logits_TV, labels_T, rows_T4, grads_T3, *ctx.shard.arguments())
        return logits_TV if ctx.overwrite_logits else dlogits_TV, None, None, None, None


def token_stats(
    logits: Tensor, labels: Tensor, shard: Shard, *, gather: Gather = one_shard, overwrite_logits: bool = False
) -> TokenStats:
    """Statistics of logits [..., V] at labels [...] (int64, ids in the whole vocabulary); `gather` brings the partials of all shards."""
    stats = _TokenStats.apply(as_rows(logits), labels.reshape(-1), shard, gather, overwrite_logits)
    return TokenStats(*(x.view(labels.shape) for x in stats))
