"""Ops on hidden states: the output head and the loss in one, chunk by chunk, so that the logits of a whole batch never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.kernels.chunks import chunk_size, plan_chunks
from megatron_plugin.kernels.head import workspace_row_bytes
from megatron_plugin.kernels.linear_token_loss import linear_token_loss_table
from megatron_plugin.kernels.linear_token_stats import linear_token_stats as swept_token_stats
from megatron_plugin.kernels.objective import COLUMNS
from megatron_plugin.kernels.sweep import Sweep
from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenLoss
from megatron_plugin.losses.objective import objective_of
from megatron_plugin.losses.reduction import LossOutput, PerToken, evaluate_loss, output_of_table
from megatron_plugin.ops.checks import check_type, checked_inputs, checked_labels, checked_shard
from megatron_plugin.ops.graph_break import graph_break
from megatron_plugin.ops.head_checks import (
    check_head,
    check_labels_on_cpu,
    check_nothing_lost,
    check_plan,
    checked_rows,
    token_shape,
)
from megatron_plugin.ops.options import Head, Plan, TensorParallel
from megatron_plugin.parallel.hidden import exchange_over

__all__ = ["linear_token_loss", "linear_token_stats"]

_WHOLE, _PLAIN, _AUTO = TensorParallel(), Head(), Plan()


@graph_break
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp: TensorParallel = _WHOLE,
    head: Head = _PLAIN,
    plan: Plan = _AUTO,
    ignore_index: int = -100,
) -> TokenStats:
    """Log-probability of each label, entropy and log-partition of each row of softmax(hidden weight^T), differentiable (two-pass).

    hidden [..., H] fp32, bf16, fp16 or fp64; weight [V_local, H] of the same dtype, tied or not; labels [...] integer ids in the whole
    vocabulary, already shifted.  With tp.sequence_parallel hidden is this rank's slice [S / ranks, ..., H] of the labels' [S, ...].
    Returns TokenStats of labels' shape, fp32 (fp64 for fp64 logits), nats; 0 for a token labelled ignore_index or outside plan.rows, whose
    gradients are exactly 0 even where its hidden state is NaN.  A token's bits do not depend on the rank.

    Memory: one chunk of logits (Plan.chunk_tokens), in forward and backward; saved are hidden, weight and 16 bytes per token.  Time: 4 GEMMs
    of 2 T H V FLOP, one of them the logits' recomputation in the backward.  dW is summed in fp32 over the chunks (on the CPU each chunk's
    half-precision product is rounded once before); with plan.main_grad it is added to weight.main_grad in the backward.
    Under tp.group: one all-gather of 16 bytes per token and rank in the forward; dX is all-reduced (reduce-scattered) chunk by chunk.

    A graph break under torch.compile.  ValueError: shapes, dtypes, devices or options that do not fit; on the CPU a label outside the
    vocabulary (on a GPU its logp is NaN) and plan.rows that leave out a live token (on a GPU such a token counts as masked).  Rows of the
    weight behind head.vocab_size may hold anything: they get no gradient and give none.  Logits as large as in `token_stats`.
    """
    check_type("plan", plan, Plan, "plan=Plan(chunk_tokens=...)")
    if plan.min_weight:
        raise ValueError(
            f"plan.min_weight={plan.min_weight} in linear_token_stats: which tokens weigh little is the loss's business, and known only in the "
            "one-pass linear_token_loss; leave it 0"
        )
    call = _prepare(hidden, weight, labels, None, tp, head, plan, ignore_index)
    return TokenStats(*(x.view(labels.shape) for x in _stats(call)))


@graph_break
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: str | Callable | TokenLoss,
    *,
    inputs: TokenInputs | None = None,
    tp: TensorParallel = _WHOLE,
    head: Head = _PLAIN,
    plan: Plan = _AUTO,
    ignore_index: int = -100,
) -> LossOutput:
    """Sum of a weighted token loss with its metrics, straight from hidden states (one-pass: the gradient is formed in the forward).

    hidden, weight, labels, tp, head as in `linear_token_stats`.  loss: a name in LOSSES, a dotted path, a function (stats, inputs) ->
    TokenTerms, or what `bind` returns.  inputs: per-token tensors of labels' shape; a token whose coefficient is 0 is masked as if it were
    labelled ignore_index.  A loss that is not token-local runs as linear_token_stats + the loss, in two passes, with the same result.

    loss_sum: 0-d with gradient, sum of coefficient x loss over live tokens.  num_tokens: 0-d int32, live tokens, of plan.rows where given.
    metric_sums: 0-d sums over live tokens.  per_token: detached tensors of labels' shape.

    Memory: one chunk of logits, dX [T, H] and, without plan.main_grad, dW, kept from forward to backward.  Time: 3 GEMMs of 2 T H V FLOP.
    Nothing waits for the GPU with plan.rows=None and plan.min_weight=0.  The backward multiplies by the upstream scalar over
    plan.grad_scale, which costs nothing where that is 1; it can run once.  Under no_grad only the logits are formed.
    A graph break under torch.compile.  ValueError as `linear_token_stats`, and inputs or loss parameters that do not fit.
    RuntimeError: a second backward.
    """
    loss = bind(loss)
    check_type("plan", plan, Plan, "plan=Plan(chunk_tokens=...)")
    if plan.min_weight and not loss.token_local:
        raise ValueError(
            f"plan.min_weight={plan.min_weight} with loss '{loss.name}', which looks at other tokens and so runs in two passes: no weight is known "
            "in the forward; leave it 0"
        )
    check_type("labels", labels, Tensor, "one integer id per token; from numbers: torch.tensor(labels)")
    inputs = checked_inputs(inputs, labels)
    call = _prepare(hidden, weight, labels, inputs.coefficient, tp, head, plan, ignore_index)
    loss, flat, live = loss.for_vocabulary(call.sweep.shard.vocab_size), inputs.map(lambda x: x.reshape(-1)), call.labels_T != ignore_index
    if not loss.token_local:
        out = evaluate_loss(loss, _stats(call), flat, live)
        return out._replace(per_token=PerToken(*(x.view(labels.shape) for x in out.per_token)))
    objective, own_metrics = objective_of(loss, flat, grad_scale=plan.grad_scale)
    columns = len(COLUMNS) + len(own_metrics)
    with _as_written(hidden):
        loss_sum, table_CT = linear_token_loss_table(*call, objective, columns, min_weight=plan.min_weight)
    return output_of_table(table_CT, loss_sum, live.sum(dtype=torch.int32), loss, own_metrics, labels.shape)


class _Call(NamedTuple):
    """A checked call, as the kernels take it.  S rows of this rank's hidden states, T tokens."""

    hidden_SH: Tensor
    weight: Tensor
    bias: Tensor | None
    labels_T: Tensor
    sweep: Sweep


def _stats(call: _Call) -> TokenStats:
    with _as_written(call.hidden_SH):
        return swept_token_stats(*call)


def _as_written(hidden: Tensor) -> torch.autocast:
    """Autocast off: the dtypes are chosen here."""
    return torch.autocast(hidden.device.type, enabled=False)


def _prepare(
    hidden: Tensor, weight: Tensor, labels: Tensor, coefficient: Tensor | None, tp: TensorParallel, head: Head, plan: Plan, ignore_index: int
) -> _Call:
    check_head(hidden, weight, head)
    check_plan(plan, hidden, weight, training=torch.is_grad_enabled())
    labels = checked_labels(labels, shape=token_shape(hidden, tp), beside="hidden", like=hidden)
    if coefficient is not None:
        labels = labels.masked_fill(coefficient == 0, ignore_index)
    V, temperature = weight.shape[0], head.temperature
    shard = checked_shard(V, tp.group, vocab_start=tp.vocab_start, vocab_size=head.vocab_size, temperature=temperature, ignore_index=ignore_index)
    on_host = labels.device.type == "cpu"  # elsewhere a look at the labels would stall the queue
    if on_host:
        check_labels_on_cpu(labels, shard)
    labels_T, kept = _kept_tokens(labels.view(-1), plan.rows, ignore_index)
    logits_dtype = plan.logits_dtype or hidden.dtype
    exchange = exchange_over(tp.group, shard, V, sequence_parallel=tp.sequence_parallel)
    T = len(labels_T)
    size = plan.chunk_tokens
    if size is None:
        # of an equal shard, not of this rank's: ranks that cut their chunks differently would wait for each other for ever
        ranks = 1 if tp.group is None else dist.get_world_size(tp.group)
        row_bytes = workspace_row_bytes(-(-shard.vocab_size // ranks), logits_dtype, weight.dtype, head.softcap)
        size = chunk_size(T if kept is None else len(kept), row_bytes, hidden.device.type)
    chunks = plan_chunks(T, exchange.slices, size, kept=kept, device=hidden.device)
    sweep = Sweep(chunks, shard, logits_dtype, head.softcap, exchange, masked_inside=not on_host, main_grad=plan.main_grad)
    return _Call(hidden.reshape(-1, hidden.shape[-1]), weight, head.bias, labels_T, sweep)


def _kept_tokens(labels_T: Tensor, rows: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Labels with every token outside `rows` masked, and the places of those that enter the GEMMs (host); None: all of them."""
    on_host = labels_T.device.type == "cpu"
    if rows is not None:
        rows = checked_rows(rows, len(labels_T))
        if not on_host:
            there = rows.pin_memory().to(labels_T.device, non_blocking=True)  # from pageable memory the copy may wait
            return torch.full_like(labels_T, ignore_index).index_copy_(0, there, labels_T[there]), rows
        check_nothing_lost(labels_T, rows, ignore_index)
    if not on_host:
        return labels_T, None
    live = labels_T != ignore_index
    return labels_T, None if live.all() else live.nonzero().view(-1)
