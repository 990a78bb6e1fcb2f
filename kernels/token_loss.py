"""One-pass op on logits: the loss of each token and the gradient of all logits, both in the forward.

    stats -> gather over shards -> terms, (a, b, c) -> gradient        (one kernel with a twin and a whole vocabulary: kernels/loss.py)

Legal for token-local losses, whose (a, b, c) are known as soon as the row's statistics are.  The backward only multiplies by the upstream
scalar over objective.grad_scale, and where that is 1 it costs nothing.  T tokens, V columns of this shard, C columns of the table.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_plugin.kernels.layout import Shard, empty_like_rows
from megatron_plugin.kernels.objective import Objective
from megatron_plugin.kernels.row_loss import row_loss, scale_rows_
from megatron_plugin.kernels.token_stats import Gather, as_rows, one_shard


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor, shard: Shard, objective: Objective, gather: Gather, overwrite_logits: bool):
        dlogits_TV = logits_TV if overwrite_logits else empty_like_rows(logits_TV)
        table_CT = row_loss(logits_TV, dlogits_TV, labels_T, shard, objective, gather)
        if overwrite_logits:
            torch.autograd.graph.increment_version(logits_TV)  # whoever saved the logits for a backward of its own is told
        ctx.save_for_backward(dlogits_TV)
        ctx.grad_scale = objective.grad_scale.clone() if isinstance(objective.grad_scale, Tensor) else objective.grad_scale
        ctx.spent = False
        ctx.mark_non_differentiable(table_CT)
        return table_CT[0].sum(), table_CT

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor, _):
        if ctx.spent:
            raise RuntimeError(
                "second backward through token_loss: its gradient was formed in the forward and handed out by the first backward; run the "
                "forward again, or use token_stats (two-pass), which recomputes"
            )
        ctx.spent = True
        (dlogits_TV,) = ctx.saved_tensors
        scale_rows_(dlogits_TV, d_loss / ctx.grad_scale)
        return dlogits_TV, None, None, None, None, None


def token_loss_table(
    logits: Tensor, labels: Tensor, shard: Shard, objective: Objective, *, gather: Gather = one_shard, overwrite_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """(sum of coefficient x loss, 0-d with gradient; table [C, T] without) of logits [..., V] at labels [...], T = labels.numel().

    Without gradient (no_grad, or logits that need none) the logits are read once and nothing is written over them.
    """
    logits_TV, labels_T = as_rows(logits), labels.reshape(-1)
    if torch.is_grad_enabled() and logits.requires_grad:  # inside Function.forward grad mode is always off
        return _TokenLoss.apply(logits_TV, labels_T, shard, objective, gather, overwrite_logits)
    table_CT = row_loss(logits_TV, None, labels_T, shard, objective, gather)
    return table_CT[0].sum(), table_CT
