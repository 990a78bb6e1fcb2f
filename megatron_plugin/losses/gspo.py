"""GSPO: one ratio for a whole sequence.  T: tokens of this call; sg: stop-gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_plugin.losses.algebra import check_number
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms
from megatron_plugin.losses.kl import LOG_RATIO_MAX
from megatron_plugin.losses.rollout_options import with_rollout_options


@with_rollout_options()
def gspo(
    stats: TokenStats, inputs: TokenInputs, *, clip_low: float | Tensor = 3e-4, clip_high: float | Tensor = 4e-4
) -> TokenTerms:
    """GSPO, -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with s = (p(y) / p_old(y))^(1 / |y|) (arXiv 2507.18071, eq. 5 to 7).

    [T], no unit: every token of a sequence y has its sequence's value, and the gradient -s A through its own log p (the paper's GSPO-token,
    eq. 14, and verl), 0 where s is clipped.  With the coefficient 1 / |y| (parallel/normaliser.py: Source(denominator="sequence")) it is
    the paper's gradient exactly.  The clips are the paper's; they bound a mean over the sequence and are far smaller than GRPO's.

    Of own answers only; with demonstrations in the step take chord or srft.  Not token-local: s needs all of y.  inputs.extra["sequence"] is the same number on all tokens of a sequence, and another on every other
    sequence of the call; a sequence lies in one call with all its trained tokens (no context parallelism over it, no chunk border in it).
    Tokens whose coefficient is 0 are not counted.  Needs inputs.advantage, the same on a whole sequence; without inputs.old_logp s = 1.
    The mean log-ratio is held to +-20 nats.  Besides, the options of losses/rollout_options.py.
    Metrics: ratio (s), clip_frac (1 where clipped): sums over tokens.
    ValueError without advantage or sequence, for clip_low outside [0, 1] or clip_high < 0.
    """
    check_number("gspo", "clip_low", clip_low, low=0, high=1)
    check_number("gspo", "clip_high", clip_high, low=0, infinite=True)
    advantage_T = inputs.require("advantage", "gspo").to(stats.logp.dtype)
    sequence_T = inputs.require("extra.sequence", "gspo")
    logp_T = stats.logp.detach()
    old_logp_T = logp_T if inputs.old_logp is None else inputs.old_logp.to(logp_T.dtype)
    live_T = torch.ones_like(logp_T, dtype=torch.bool) if inputs.coefficient is None else inputs.coefficient != 0
    mean_T = _sequence_mean(torch.where(live_T, logp_T - old_logp_T, 0.0), live_T, sequence_T)
    # the value is the sequence's, the derivative each token's own
    ratio_T = (mean_T + (stats.logp - logp_T)).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    kept_T = torch.where(advantage_T < 0, ratio_T.clamp(min=1 - clip_low), ratio_T.clamp(max=1 + clip_high))
    metrics = {"ratio": ratio_T.detach(), "clip_frac": (kept_T != ratio_T).to(ratio_T.dtype)}
    return TokenTerms(loss=-advantage_T * kept_T, metrics=metrics)


def _sequence_mean(values_T: Tensor, live_T: Tensor, sequence_T: Tensor) -> Tensor:
    """The mean of `values_T` over the live tokens with the same number in `sequence_T`, on each of them."""
    # place among the sorted numbers: unique() would wait for the device to learn how many there are
    ordered_T, order_T = sequence_T.sort(stable=True)
    step_T = torch.zeros_like(order_T)
    step_T[1:] = ordered_T[1:] != ordered_T[:-1]
    place_T = torch.empty_like(order_T).scatter_(0, order_T, step_T.cumsum(0))
    # in fp64, since a GPU adds in any order and the ranks of a tensor-parallel group must see the same mean
    zeros_T = torch.zeros_like(values_T, dtype=torch.float64)
    total_T = zeros_T.index_add(0, place_T, values_T.double())
    count_T = zeros_T.index_add(0, place_T, live_T.double())
    return (total_T / count_T.clamp(min=1))[place_T].to(values_T.dtype)
