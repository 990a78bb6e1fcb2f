"""The public ops: logits and labels in, statistics or a weighted loss out, the same under every tensor-parallel split."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.kernels.token_stats import token_stats as shard_token_stats
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenLoss
from megatron_plugin.losses.reduction import LossOutput, PerToken, evaluate_loss
from megatron_plugin.parallel.vocab import merge_over, shard_of

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

    ValueError: shapes, dtypes or devices that do not fit; a label outside the vocabulary (on the CPU; on a GPU its logp is NaN).
    """
    labels = _checked_labels(logits, labels)
    shard = shard_of(
        logits.shape[-1], tp_group, vocab_start=vocab_start, vocab_size=vocab_size, temperature=temperature, ignore_index=ignore_index
    )
    return shard_token_stats(logits, labels, shard, merge=merge_over(tp_group, shard, logits.shape[-1]), overwrite_logits=overwrite_logits)


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
) -> LossOutput:
    """Sum of a weighted token loss with its metrics: what megatron-core's loss_func returns, before any division.

    loss: a name in LOSSES, a dotted path, a function (stats, inputs) -> TokenTerms, or what `bind` returns.  inputs: per-token tensors
    of labels' shape; a token whose coefficient is 0 is masked as if it were labelled ignore_index.  The rest as in `token_stats`.

    loss_sum: 0-d with gradient, sum of coefficient x loss over live tokens.  num_tokens: 0-d int32, live tokens.  metric_sums: 0-d sums
    over live tokens.  per_token: detached tensors of labels' shape.  Nothing here waits for the GPU.
    """
    loss = bind(loss)
    labels = _checked_labels(logits, labels)
    inputs = _checked_inputs(inputs, labels)
    if inputs.coefficient is not None:
        labels = labels.masked_fill(inputs.coefficient == 0, ignore_index)
    shard = shard_of(
        logits.shape[-1], tp_group, vocab_start=vocab_start, vocab_size=vocab_size, temperature=temperature, ignore_index=ignore_index
    )
    stats = shard_token_stats(logits, labels, shard, merge=merge_over(tp_group, shard, logits.shape[-1]), overwrite_logits=overwrite_logits)
    flat = TokenStats(*(x.view(-1) for x in stats))
    live = labels.view(-1) != ignore_index
    out = evaluate_loss(loss.for_vocabulary(shard.vocab_size), flat, inputs.map(lambda x: x.reshape(-1)), live)
    return out._replace(per_token=PerToken(*(x.view(labels.shape) for x in out.per_token)))


def _checked_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """labels as contiguous int64; ValueError when they cannot belong to these logits."""
    if logits.dim() < 1 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"logits must be floating point [..., vocabulary] in fp32, bf16, fp16 or fp64, got {logits.dtype} {list(logits.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integer ids, got {labels.dtype}; use labels.long() if they are ids")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels {list(labels.shape)} do not fit logits {list(logits.shape)}: expected {list(logits.shape[:-1])}, one id per row"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, logits on {logits.device}; move the labels with labels.to(logits.device)")
    return labels.long().contiguous()


def _checked_inputs(inputs: TokenInputs | None, labels: Tensor) -> TokenInputs:
    inputs = TokenInputs() if inputs is None else inputs
    for name, x in inputs.tensors().items():
        if x.shape != labels.shape or x.device != labels.device:
            raise ValueError(
                f"inputs.{name} is {list(x.shape)} on {x.device}; expected one value per label, {list(labels.shape)} on {labels.device}"
            )
        if x.requires_grad:
            raise ValueError(f"inputs.{name} requires a gradient; inputs are constants of the step: pass inputs.{name}.detach()")
    return inputs
