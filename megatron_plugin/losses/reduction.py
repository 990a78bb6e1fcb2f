"""From one term per token to what a training step needs: a sum with gradient, a count, sums for the log.  T: tokens of this call.

Nothing here reads a value back from the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_plugin.losses.contract import BASE_METRICS, TokenInputs, TokenLoss, TokenStats, TokenTerms, check_terms

__all__ = ["LossOutput", "PerToken", "evaluate_loss", "reduce_terms"]


class PerToken(NamedTuple):
    """[T] each, detached, 0 in masked rows."""

    logp: Tensor
    """nats."""
    entropy: Tensor
    """nats."""
    weight: Tensor
    """The factor in front of -logp; 1 for a loss without one."""
    loss: Tensor
    """Before the coefficient."""


class LossOutput(NamedTuple):
    """What one call of a loss gives."""

    loss_sum: Tensor
    """0-d fp32 (fp64 for fp64 statistics), with gradient: sum over live tokens of coefficient x loss."""
    num_tokens: Tensor
    """0-d int32: live tokens."""
    metric_sums: dict[str, Tensor]
    """0-d fp32 each, detached: sums over live tokens, without the coefficient.  BASE_METRICS and the loss's own."""
    per_token: PerToken


def reduce_terms(stats: TokenStats, terms: TokenTerms, inputs: TokenInputs, live: Tensor) -> LossOutput:
    """Sum `terms` over the tokens where `live` ([T] bool) is true.

    Rows that are not live add exactly 0 to every sum whatever their terms, coefficient or statistics hold, and send exactly 0 back into
    `terms.loss`.  With no live token the sum is 0 and keeps its gradient edge, so that every rank meets the
    collectives of the backward.
    """
    check_terms(terms, live.shape)
    # where, before the product: 0 * NaN is NaN, in the value and again in the backward
    loss_T = torch.where(live, terms.loss, 0.0)
    weighted_T = loss_T
    if inputs.coefficient is not None:
        weighted_T = loss_T * torch.where(live, inputs.coefficient, 0.0).to(loss_T.dtype)

    logp_T, entropy_T = stats.logp.detach(), stats.entropy.detach()
    weight_T = torch.ones_like(logp_T) if terms.weight is None else terms.weight.detach()
    per_token = PerToken(*(torch.where(live, column, 0.0) for column in (logp_T, entropy_T, weight_T, terms.loss.detach())))
    base = (terms.loss, -logp_T, logp_T.exp(), entropy_T, logp_T + entropy_T, weight_T, weight_T.square())
    columns = dict(zip(BASE_METRICS, base, strict=True)) | dict(terms.metrics)
    table_MT = torch.stack([column.detach().to(torch.float32) for column in columns.values()])
    sums_M = torch.where(live, table_MT, 0.0).sum(-1)
    return LossOutput(
        loss_sum=weighted_T.sum(),
        num_tokens=live.sum(dtype=torch.int32),
        metric_sums=dict(zip(columns, sums_M.unbind(), strict=True)),
        per_token=per_token,
    )


def evaluate_loss(loss: TokenLoss, stats: TokenStats, inputs: TokenInputs, live: Tensor) -> LossOutput:
    """`loss` on these statistics, reduced.  The gradient of masked rows is exactly 0 even where their advantage or old_logp is NaN:
    the derivative of such a row is NaN and 0 * NaN is NaN, so the statistics too pass through a where, whose backward selects."""
    kept = TokenStats(*(torch.where(live, column, 0.0) for column in stats))
    ones_or_given = torch.ones_like(stats.logp) if inputs.coefficient is None else inputs.coefficient
    inputs = replace(inputs, coefficient=torch.where(live, ones_or_given, 0.0))  # a loss that looks at other tokens must see which are masked
    return reduce_terms(kept, loss(kept, inputs), inputs, live)
