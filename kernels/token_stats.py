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
from megatron_plugin.kernels.partials import finish_rows

Merge = Callable[[Tensor], Tensor]


class TokenStats(NamedTuple):
    """Per-token statistics of the softmax over the whole vocabulary.  Shapes are those of the labels; fp32 (fp64 for fp64 logits)."""

    logp: Tensor
    """log-probability of the label, nats.  0 for a masked row, NaN for a label outside the vocabulary."""
    entropy: Tensor
    """Shannon entropy of the row, nats."""
    lse: Tensor
    """log-partition, nats: logsumexp(logits / temperature).  An output; nothing is computed from it."""


def one_shard(partials_T4: Tensor) -> Tensor:
    """The merge of a vocabulary that is not split."""
    return partials_T4


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor, shard: Shard, merge: Merge, overwrite_logits: bool):
        where = (shard.vocab_start, shard.vocab_size, shard.ignore_index, shard.temperature)
        partials_T4 = shard_ops.stats(logits_TV, labels_T, *where)
        dtype = partials_T4.dtype
        *stats, rows_T4 = finish_rows(merge(partials_T4), labels_T, shard, dtype)
        ctx.save_for_backward(logits_TV, labels_T, rows_T4.to(dtype))
        ctx.where, ctx.overwrite_logits = where, overwrite_logits
        ctx.set_materialize_grads(False)
        return tuple(x.to(dtype) for x in stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_stats):
        logits_TV, labels_T, rows_T4 = ctx.saved_tensors
        zeros_T = torch.zeros_like(rows_T4[:, 0])
        grads_T3 = torch.stack([zeros_T if d is None else d for d in d_stats], -1)
        op = shard_ops.grad_ if ctx.overwrite_logits else shard_ops.grad
        dlogits_TV = op(logits_TV, labels_T, rows_T4, grads_T3, *ctx.where)
        return logits_TV if ctx.overwrite_logits else dlogits_TV, None, None, None, None


def token_stats(
    logits: Tensor, labels: Tensor, shard: Shard, *, merge: Merge = one_shard, overwrite_logits: bool = False
) -> TokenStats:
    """Statistics of logits [..., V] at labels [...] (int64, ids in the whole vocabulary); `merge` joins [T, 4] partials over shards."""
    logits_TV = logits.reshape(-1, logits.shape[-1])
    if logits_TV.stride(-1) != 1 or logits_TV.stride(0) < logits_TV.shape[1]:  # transposed, or rows that overlap (expand)
        logits_TV = logits_TV.contiguous()
    stats = _TokenStats.apply(logits_TV, labels.reshape(-1), shard, merge, overwrite_logits)
    return TokenStats(*(x.view(labels.shape) for x in stats))
