"""Ops on logits: logits and labels in, statistics or a weighted loss out, the same under every tensor-parallel split."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.kernels.token_loss import token_loss_table
from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.kernels.token_stats import token_stats as shard_token_stats
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenLoss
from megatron_plugin.losses.objective import objective_of
from megatron_plugin.losses.reduction import LossOutput, PerToken, evaluate_loss, output_of_table
from megatron_plugin.ops.checks import check_grad_scale, check_type, checked_inputs, checked_labels, checked_shard
from megatron_plugin.ops.graph_break import graph_break
from megatron_plugin.parallel.vocab import gather_over

__all__ = ["token_loss", "token_stats"]


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
) -> TokenStats:
    """Log-probability of each label, entropy of each row and log-partition, differentiable in all three (two-pass).

    logits [..., V_local] fp32, bf16, fp16, or fp64 (not in Triton); labels [...] integer ids in the whole vocabulary, already shifted.
    Returns TokenStats of labels' shape, fp32 (fp64 for fp64 logits), nats.  Under `tp_group` one all-gather of 16 bytes per token and
    rank in the forward, none in the backward; all ranks hold the same bits.

    vocab_start: first column of this rank; None means equal shards in rank order.  vocab_size: the true vocabulary, columns from there
    on (Megatron's padding) count as -inf.  A row labelled ignore_index gives 0 and no gradient, even where its logits are NaN.
    overwrite_logits: the backward writes the gradient over the logits, which saves a [T, V] tensor; nothing may read them afterwards.

    The largest logit / temperature of a row may reach +-1e9.  From 1.49e9 on (2^31 ln 2; fp64: 8e17) the row is NaN, statistics and gradient:
    fp32 has no digits left there to subtract it with.  Columns far below it, -inf or finite masks such as -1e30, have probability 0.

    ValueError: shapes, dtypes or devices that do not fit; a label outside the vocabulary (on the CPU; on a GPU its logp is NaN).
    """
    labels = _checked_labels(logits, labels)
    shard = checked_shard(
        logits.shape[-1], tp_group, vocab_start=vocab_start, vocab_size=vocab_size, temperature=temperature, ignore_index=ignore_index
    )
    return shard_token_stats(logits, labels, shard, gather=gather_over(tp_group, shard, logits.shape[-1]), overwrite_logits=overwrite_logits)


@graph_break
def token_loss(
    logits: Tensor,
    labels: Tensor,
    loss: str | Callable | TokenLoss,
    *,
    inputs: TokenInputs | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
    grad_scale: float | Tensor = 1.0,
) -> LossOutput:
    """Sum of a weighted token loss with its metrics: what megatron-core's loss_func returns, before any division (one-pass).

    A token-local loss is weighed and differentiated inside the forward: one kernel on a GPU whose loss has a twin, two around one
    all-gather under `tp_group`.  A loss that needs other tokens first runs in two passes, with the same result.

    loss: a name in LOSSES, a dotted path, a function (stats, inputs) -> TokenTerms, or what `bind` returns.  inputs: per-token tensors
    of labels' shape; a token whose coefficient is 0 is masked as if it were labelled ignore_index.  overwrite_logits: the gradient takes
    the place of the logits, for a token-local loss already in the forward (of a leaf too, whose .grad is then its own memory).  The rest as in `token_stats`.

    grad_scale: the factor that the backward will bring (loss scale / micro-batches, say), a number or a 0-d tensor on the logits' device: the
    gradient formed in the forward carries it, the backward multiplies by upstream / grad_scale, which costs nothing where that is 1.  Needed
    with fp16 logits and a loss scale: a gradient that is stored before it is scaled underflows.  Without effect in two passes.

    loss_sum: 0-d with gradient, sum of coefficient x loss over live tokens.  num_tokens: 0-d int32, live tokens.  metric_sums: 0-d sums
    over live tokens.  per_token: detached tensors of labels' shape.  Nothing here waits for the GPU.
    """
    loss = bind(loss)
    labels = _checked_labels(logits, labels)
    inputs = checked_inputs(inputs, labels)
    check_grad_scale("grad_scale", grad_scale, logits)
    if inputs.coefficient is not None:
        labels = labels.masked_fill(inputs.coefficient == 0, ignore_index)
    columns = logits.shape[-1]
    shard = checked_shard(columns, tp_group, vocab_start=vocab_start, vocab_size=vocab_size, temperature=temperature, ignore_index=ignore_index)
    gather = gather_over(tp_group, shard, columns)
    loss, flat, live = loss.for_vocabulary(shard.vocab_size), inputs.map(lambda x: x.reshape(-1)), labels.view(-1) != ignore_index
    if not loss.token_local:
        stats = shard_token_stats(logits, labels, shard, gather=gather, overwrite_logits=overwrite_logits)
        out = evaluate_loss(loss, TokenStats(*(x.view(-1) for x in stats)), flat, live)
        return out._replace(per_token=PerToken(*(x.view(labels.shape) for x in out.per_token)))
    objective, own_metrics = objective_of(loss, flat, grad_scale=grad_scale)
    loss_sum, table_CT = token_loss_table(logits, labels, shard, objective, gather=gather, overwrite_logits=overwrite_logits)
    return output_of_table(table_CT, loss_sum, live.sum(dtype=torch.int32), loss, own_metrics, labels.shape)


def _checked_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """labels as contiguous int64; ValueError when they cannot belong to these logits."""
    check_type("logits", logits, Tensor, "[..., vocabulary], floating point")
    if logits.dim() < 1 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"logits must be floating point [..., vocabulary] in fp32, bf16, fp16 or fp64, got {logits.dtype} {list(logits.shape)}")
    return checked_labels(labels, shape=logits.shape[:-1], beside="logits", like=logits)
