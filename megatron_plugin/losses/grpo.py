"""The clipped policy gradient of GRPO, token level.  T: tokens of this call."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_plugin.losses.algebra import check_number
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms
from megatron_plugin.losses.kl import LOG_RATIO_MAX
from megatron_plugin.losses.rollout_options import with_rollout_options


@with_rollout_options()
def grpo(
    stats: TokenStats,
    inputs: TokenInputs,
    *,
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.2,
    dual_clip: float | Tensor = 3.0,
) -> TokenTerms:
    """GRPO, -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = p / p_old (arXiv 2402.03300; CHORD, arXiv 2508.11408, eq. 2).

    [T], no unit.  Needs inputs.advantage; without inputs.old_logp the step is strictly on-policy: r = 1 and dF/dlogp = -A.
    Differentiated through r; the gradient is 0 where r is clipped.  For A < 0 the loss is also bounded by -dual_clip A (verl and Trinity
    have it on at 3; TRL, slime and NeMo-RL off: dual_clip=inf).  The log-ratio is held to +-20 nats (verl; TRL and slime do not).
    A token of probability 0 under both policies has no ratio and gives NaN.
    Besides, the options of losses/rollout_options.py: a KL to the reference, weights for rollout-trainer mismatch.
    Metrics: ratio (r), clip_frac (1 where clipped).
    ValueError without advantage, for clip_low outside [0, 1], clip_high < 0 or dual_clip <= 1.
    """
    return clipped_policy_gradient("grpo", stats, inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def clipped_policy_gradient(
    loss: str, stats: TokenStats, inputs: TokenInputs, *, clip_low: float | Tensor, clip_high: float | Tensor, dual_clip: float | Tensor
) -> TokenTerms:
    """`grpo` without its options, for losses that have it on some of their tokens; `loss` is named in errors."""
    check_number(loss, "clip_low", clip_low, low=0, high=1)
    check_number(loss, "clip_high", clip_high, low=0, infinite=True)
    check_number(loss, "dual_clip", dual_clip, above=1, infinite=True)
    advantage_T = inputs.require("advantage", loss).to(stats.logp.dtype)
    old_logp_T = stats.logp.detach() if inputs.old_logp is None else inputs.old_logp.to(stats.logp.dtype)
    ratio_T = (stats.logp - old_logp_T).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    # The minimum, branch by branch: only the upper bound can bind for A >= 0, only the lower one and the dual clip for A < 0.
    # clamp passes the gradient at a bound, where min and max would halve it.
    kept_T = torch.where(advantage_T < 0, ratio_T.clamp(min=1 - clip_low).clamp(max=dual_clip), ratio_T.clamp(max=1 + clip_high))
    metrics = {"ratio": ratio_T.detach(), "clip_frac": (kept_T != ratio_T).to(ratio_T.dtype)}
    return TokenTerms(loss=-advantage_T * kept_T, metrics=metrics)
