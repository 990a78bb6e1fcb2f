"""One-pass step over the rows of one logits tensor: terms of a token-local loss, and the gradient at once.

Both the op on logits (token_loss.py) and the chunks of the op on hidden states (linear_token_loss.py) go through here.
T tokens, V columns of this shard, R ranks, C columns of the table.
"""

import torch
from torch import Tensor

from megatron_plugin.kernels import shard_ops
from megatron_plugin.kernels.backend import cluster_asked_for, select
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.objective import Objective, scaled
from megatron_plugin.kernels.partials import finish_rows, merge_partials
from megatron_plugin.kernels.token_stats import Gather, TokenStats, one_shard

SCALE_BLOCK = 2**22  # elements of a temporary, where PyTorch scales


def row_loss(
    logits: Tensor, out: Tensor | None, labels: Tensor, shard: Shard, objective: Objective, gather: Gather = one_shard
) -> Tensor:
    """Table [C, T] (objective.COLUMNS, then the loss's own metrics) of logits [T, V]; dF/dlogits into `out`, unless that is None.

    out: `logits` itself, or a [T, V] tensor from `empty_like_rows`; in another dtype only where its rows start at 16-byte boundaries.
    With a twin on Triton: one launch for a whole vocabulary, two around one all-gather for a split one.
    """
    if cluster_asked_for():
        from megatron_plugin.kernels.cluster import loss_cluster

        return loss_cluster(logits, out, labels, shard, objective, gather)
    if select(logits) == "triton" and objective.twin is not None:
        from megatron_plugin.kernels.loss import loss_triton

        partials = None if gather is one_shard else gather(shard_ops.stats(logits, labels, *shard.arguments()))
        return loss_triton(logits, out, labels, shard, objective, partials)
    partials_T4 = shard_ops.stats(logits, labels, *shard.arguments())
    work = partials_T4.dtype
    *stats, rows_T4 = finish_rows(merge_partials(gather(partials_T4)), labels, shard, work)
    table, grads_T3 = objective.terms(TokenStats(*(x.to(work) for x in stats)), labels != shard.ignore_index, objective.inputs)
    if out is not None:
        grads_T3 = scaled(grads_T3, objective.grad_scale)
        shard_ops.write_grad(logits, out, labels, rows_T4.to(work), grads_T3.contiguous(), shard)
    return table


def scale_rows_(x: Tensor, factor: Tensor) -> None:
    """x [T, V] *= factor (0-d), and nothing at all where the factor is 1, which a GPU decides for itself.

    A zero stays zero even where the factor is inf or NaN (a loss scale that overflowed): masked rows get exactly 0, and 0 * inf is NaN.
    """
    if not x.is_cuda:
        if factor.item() != 1.0:
            if factor.isfinite():
                x.mul_(factor.to(x.dtype) if x.dtype == torch.float64 else factor)
            else:
                _scale_but_zeros_(x, factor)
    elif x.dtype == torch.float64 or select(x) == "eager":
        _scale_but_zeros_(x, factor)
    else:
        from megatron_plugin.kernels.scale import scale_triton

        scale_triton(x, factor)


def _scale_but_zeros_(x: Tensor, factor: Tensor) -> None:
    step = max(1, SCALE_BLOCK // max(x.shape[1], 1))
    for rows in x.split(step):
        rows.copy_(torch.where(rows == 0, 0.0, rows * factor))
