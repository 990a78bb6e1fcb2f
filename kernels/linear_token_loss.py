"""One-pass op on hidden states: loss, dX, dW and db in the forward, chunk by chunk, in 3 GEMMs and one chunk of logits.

    for each chunk:  x W^T  ->  row_loss (statistics, terms, gradient over the logits)  ->  dX = dz W  ->  dW += dz^T x

Legal for token-local losses.  T tokens, n in a chunk, V columns of this shard, H hidden, C columns of the table (objective.COLUMNS).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_plugin.kernels.objective import COLUMNS, Objective
from megatron_plugin.kernels.row_loss import row_loss, scale_rows_
from megatron_plugin.kernels.sweep import Gradients, Sweep

REACH = COLUMNS.index("reach")


def _table(labels_T: Tensor, sweep: Sweep, columns: int) -> Tensor:
    return labels_T.new_zeros(columns, len(labels_T), dtype=torch.promote_types(sweep.logits_dtype, torch.float32))


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_SH: Tensor, weight: Tensor, bias: Tensor | None, labels_T: Tensor, sweep: Sweep, objective: Objective, columns: int,
        min_weight: float,
    ):
        ctx.main_grad = sweep.main_grad if ctx.needs_input_grad[1] else None
        if ctx.main_grad is not None:
            ctx.main_grad.forward_begins()
        table_CT, gradients = _sweep_once(hidden_SH, weight, bias, labels_T, sweep, objective, columns, min_weight, ctx.needs_input_grad[:3])
        # On ctx, not through save_for_backward: scaled in place, handed out once, and freed then
        ctx.gradients = gradients.result()
        ctx.grad_scale = objective.grad_scale.clone() if isinstance(objective.grad_scale, Tensor) else objective.grad_scale
        ctx.mark_non_differentiable(table_CT)
        return table_CT[0].sum(), table_CT

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor, _):
        if ctx.gradients is None:
            raise RuntimeError(
                "second backward through linear_token_loss: its gradient was formed in the forward and handed out by the first backward; "
                "run the forward again, or use linear_token_stats (two-pass), which recomputes"
            )
        (dx, dw, db), ctx.gradients = ctx.gradients, None
        factor = d_loss / ctx.grad_scale
        for gradient in (dx, dw, db):
            if gradient is not None:
                scale_rows_(gradient if gradient.dim() == 2 else gradient[None], factor)
        if ctx.main_grad is not None:
            ctx.main_grad.backward_done(d_loss, ctx.grad_scale)
            dw = ctx.main_grad.placeholder()
        return dx, dw, db, None, None, None, None, None


def _sweep_once(hidden_SH, weight, bias, labels_T, sweep, objective, columns, min_weight, needed) -> tuple[Tensor, Gradients]:
    """Table [C, T] and gradients of all chunks."""
    table_CT = _table(labels_T, sweep, columns)
    projection = sweep.projection(weight, bias, gradient=True)
    gradients = Gradients(sweep, hidden_SH, weight, bias, needed)
    for chunk, x, labels in sweep.batches(hidden_SH, labels_T):
        z, dz = projection.logits(x), projection.room(chunk.size)
        table = row_loss(z, dz, labels, sweep.shard, objective.at(chunk.tokens), sweep.exchange.gather_partials)
        table_CT[:, chunk.tokens] = table
        few = None
        if min_weight > 0:  # the statistics are the same bits on every rank, so are the rows; NaN stays
            few = (~(table[REACH] < min_weight)).nonzero().view(-1)
            few = None if len(few) == chunk.size else few
        gradients.add(chunk, x, projection.gradient(chunk.size), few)
    return table_CT, gradients


def linear_token_loss_table(
    hidden_SH: Tensor, weight: Tensor, bias: Tensor | None, labels_T: Tensor, sweep: Sweep, objective: Objective, columns: int, *,
    min_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(sum of coefficient x loss, 0-d with gradient; table [C, T] without) of the tokens of `sweep`, 0 for all others.

    Without gradient (no_grad, or nothing that needs one) only the logits are formed and nothing is written to main_grad.
    min_weight: tokens whose reach lies below it enter neither backward GEMM; looking for them waits for the device, once per chunk.
    """
    needed = [x is not None and x.requires_grad for x in (hidden_SH, weight, bias)]
    if torch.is_grad_enabled() and any(needed):  # inside Function.forward grad mode is always off
        return _LinearTokenLoss.apply(hidden_SH, weight, bias, labels_T, sweep, objective, columns, min_weight)
    table_CT = _table(labels_T, sweep, columns)
    projection = sweep.projection(weight, bias, gradient=False)
    for chunk, x, labels in sweep.batches(hidden_SH.detach(), labels_T):
        objective_n, gather = objective.at(chunk.tokens), sweep.exchange.gather_partials
        table_CT[:, chunk.tokens] = row_loss(projection.logits(x), None, labels, sweep.shard, objective_n, gather)
    return table_CT[0].sum(), table_CT
