"""From one term per token to what a training step needs: a sum with gradient, a count, sums for the log.  T: tokens of this call.

Nothing here reads a value back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_plugin.kernels.objective import COLUMNS
from megatron_plugin.losses.contract import BASE_METRICS, TokenInputs, TokenLoss, TokenStats, TokenTerms, check_terms
from megatron_plugin.losses.regularisers import REGULARISERS

__all__ = ["LossOutput", "PerToken", "evaluate_loss", "evaluate_tokens", "masked_terms", "output_of_table", "term_table"]


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


def masked_terms(loss: TokenLoss, stats: TokenStats, inputs: TokenInputs, live: Tensor) -> tuple[TokenTerms, TokenInputs]:
    """`loss` on statistics that are 0 where not `live` ([T] bool), and the inputs as it saw them: a coefficient of 0 in masked rows.

    The gradient of masked rows is exactly 0 even where their advantage or old_logp is NaN: the derivative of such a row is NaN and
    0 * NaN is NaN, so the statistics pass through a where, whose backward selects.
    """
    kept = TokenStats(*(torch.where(live, column, 0.0) for column in stats))
    ones_or_given = torch.ones_like(stats.logp) if inputs.coefficient is None else inputs.coefficient
    inputs = replace(inputs, coefficient=torch.where(live, ones_or_given, 0.0))  # a loss that looks at other tokens must see which are masked
    return loss(kept, inputs), inputs


def term_table(stats: TokenStats, terms: TokenTerms, inputs: TokenInputs, live: Tensor) -> tuple[Tensor, Tensor]:
    """The table [C, T] of kernels/objective.py, detached (its reach left 0), and coefficient x loss [T] with gradient; 0 where not live."""
    check_terms(terms, live.shape)
    # where, before the product: 0 * NaN is NaN, in the value and again in the backward
    loss_T = torch.where(live, terms.loss, 0.0)
    weighted_T = loss_T
    if inputs.coefficient is not None:
        weighted_T = loss_T * torch.where(live, inputs.coefficient, 0.0).to(loss_T.dtype)
    logp_T, entropy_T = stats.logp.detach(), stats.entropy.detach()
    weight_T = torch.ones_like(logp_T) if terms.weight is None else terms.weight.detach()
    nothing_T = torch.zeros_like(logp_T)
    added = [terms.metrics.get(name, nothing_T) for name in REGULARISERS]
    own = [column for name, column in terms.metrics.items() if name not in REGULARISERS]
    columns = (weighted_T, loss_T, logp_T, entropy_T, weight_T, logp_T.exp(), weight_T.square(), nothing_T, *added, *own)
    table_CT = torch.stack([column.detach().to(logp_T.dtype) for column in columns])
    return torch.where(live, table_CT, 0.0), weighted_T


def output_of_table(
    table_CT: Tensor, loss_sum: Tensor, num_tokens: Tensor, loss: TokenLoss, own_metrics: Sequence[str], shape: Sequence[int]
) -> LossOutput:
    """What one call of a loss gives, from the table of its tokens (of `shape`)."""
    sums = dict(zip((*COLUMNS, *own_metrics), table_CT.float().sum(1).unbind(), strict=True))
    base = (sums["loss"], -sums["logp"], sums["token_prob"], sums["entropy"], sums["logp"] + sums["entropy"], sums["weight"], sums["weight_sq"])
    metric_sums = dict(zip(BASE_METRICS, base, strict=True)) | {name: sums[name] for name in (*own_metrics, *loss.regularisers)}
    per_token = PerToken(*(table_CT[COLUMNS.index(name)].view(shape) for name in PerToken._fields))
    return LossOutput(loss_sum, num_tokens, metric_sums, per_token)


def evaluate_loss(loss: TokenLoss, stats: TokenStats, inputs: TokenInputs, live: Tensor) -> LossOutput:
    """`loss` on the statistics [T] of tokens, summed where `live` ([T] bool), differentiable through the statistics (two-pass).

    Rows that are not live add exactly 0 to every sum whatever their statistics, inputs or coefficient hold, and send exactly 0 back.  With
    no live token the sum is 0 and keeps its gradient edge, so that every rank meets the collectives of the backward.
    """
    return evaluate_tokens(loss, stats, inputs, live)[1]


def evaluate_tokens(loss: TokenLoss, stats: TokenStats, inputs: TokenInputs, live: Tensor) -> tuple[Tensor, LossOutput]:
    """coefficient x loss of every token [T], with gradient and before the sum, and what `evaluate_loss` gives."""
    terms, inputs = masked_terms(loss, stats, inputs, live)
    table_CT, weighted_T = term_table(stats, terms, inputs, live)
    own = [name for name in terms.metrics if name not in REGULARISERS]
    return weighted_T, output_of_table(table_CT, weighted_T.sum(), live.sum(dtype=torch.int32), loss, own, live.shape)
