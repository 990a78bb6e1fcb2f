"""Two-pass op on hidden states: statistics in the forward, the logits once more in the backward.  For any objective, in 4 GEMMs.

    forward:   for each chunk  x W^T -> stats;  one gather over the shards
    backward:  for each chunk  x W^T -> gradient over the logits -> dX = dz W -> dW += dz^T x

Saved: hidden states, weight, and four numbers per token.  T tokens, n in a chunk, V columns of this shard, H hidden.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_plugin.kernels import shard_ops
from megatron_plugin.kernels.partials import finish_rows, merge_partials
from megatron_plugin.kernels.sweep import Gradients, Sweep
from megatron_plugin.kernels.token_stats import TokenStats


def _forward(hidden_SH: Tensor, weight: Tensor, bias: Tensor | None, labels_T: Tensor, sweep: Sweep) -> tuple[list[Tensor], Tensor]:
    """(logp, entropy, lse) [T] and the rows [T, 4] that the gradient needs."""
    work = torch.promote_types(sweep.logits_dtype, torch.float32)
    partials_T4 = labels_T.new_zeros(len(labels_T), 4, dtype=work)
    partials_T4[:, 1] = 1.0  # s of a row that is not read
    projection = sweep.projection(weight, bias, gradient=False)
    for chunk, x, labels in sweep.batches(hidden_SH, labels_T):
        partials_T4[chunk.tokens] = shard_ops.stats(projection.logits(x), labels, *sweep.shard.arguments())
    *stats, rows_T4 = finish_rows(merge_partials(sweep.exchange.gather_partials(partials_T4)), labels_T, sweep.shard, work)
    return [x.to(work) for x in stats], rows_T4.to(work)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_SH: Tensor, weight: Tensor, bias: Tensor | None, labels_T: Tensor, sweep: Sweep):
        stats, rows_T4 = _forward(hidden_SH, weight, bias, labels_T, sweep)
        ctx.save_for_backward(hidden_SH, weight, bias, labels_T, rows_T4)
        ctx.sweep = sweep
        ctx.set_materialize_grads(False)
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_stats):
        hidden_SH, weight, bias, labels_T, rows_T4 = ctx.saved_tensors
        sweep: Sweep = ctx.sweep
        zeros_T = torch.zeros_like(rows_T4[:, 0])
        grads_T3 = torch.stack([zeros_T if d is None else d for d in d_stats], -1)
        with torch.autocast(hidden_SH.device.type, enabled=False):  # as in the forward; here the caller's setting is in force again
            projection = sweep.projection(weight, bias, gradient=True)
            gradients = Gradients(sweep, hidden_SH, weight, bias, ctx.needs_input_grad[:3])
            for chunk, x, labels in sweep.batches(hidden_SH, labels_T):
                z, dz = projection.logits(x), projection.room(chunk.size)
                shard_ops.write_grad(z, dz, labels, rows_T4[chunk.tokens], grads_T3[chunk.tokens], sweep.shard)
                gradients.add(chunk, x, projection.gradient(chunk.size))
            dx, dw, db = gradients.result()
        if ctx.needs_input_grad[1] and sweep.main_grad is not None:
            dw = sweep.main_grad.placeholder()
        return dx, dw, db, None, None


def linear_token_stats(hidden_SH: Tensor, weight: Tensor, bias: Tensor | None, labels_T: Tensor, sweep: Sweep) -> TokenStats:
    """Statistics [T] of the tokens of `sweep`, 0 for all others, differentiable by hidden states, weight and bias."""
    return TokenStats(*_LinearTokenStats.apply(hidden_SH, weight, bias, labels_T, sweep))
