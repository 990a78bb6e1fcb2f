"""CISPO: the ratio is clipped, not the gradient.  T: tokens of this call; sg: stop-gradient."""

from __future__ import annotations

from torch import Tensor

from megatron_plugin.losses.algebra import check_number, weighted_nll
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms
from megatron_plugin.losses.kl import LOG_RATIO_MAX
from megatron_plugin.losses.rollout_options import with_rollout_options


@with_rollout_options()
def cispo(
    stats: TokenStats, inputs: TokenInputs, *, clip_low: float | Tensor = 1.0, clip_high: float | Tensor = 4.0
) -> TokenTerms:
    """CISPO, -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p with r = p / p_old (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    [T] nats.  Every token keeps a gradient, however far its ratio is outside the clip; in GRPO it would be 0 there.  Needs
    inputs.advantage; without inputs.old_logp r = 1.  By default the lower bound is off, as in the paper, and the upper one is 5, what TRL
    recommends (it takes the bound itself, not 1 + clip_high); verl has 0.2 and 0.2.  The log-ratio is held to +-20 nats.
    Besides, the options of losses/rollout_options.py.
    weight: clip(r) A.  Metrics: ratio (r), clip_frac (1 where clipped).
    ValueError without advantage, for clip_low outside [0, 1] or clip_high < 0.
    """
    check_number("cispo", "clip_low", clip_low, low=0, high=1)
    check_number("cispo", "clip_high", clip_high, low=0, infinite=True)
    advantage_T = inputs.require("advantage", "cispo").to(stats.logp.dtype)
    logp_T = stats.logp.detach()
    old_logp_T = logp_T if inputs.old_logp is None else inputs.old_logp.to(stats.logp.dtype)
    ratio_T = (logp_T - old_logp_T).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    kept_T = ratio_T.clamp(min=1 - clip_low).clamp(max=1 + clip_high)
    weight_T = kept_T * advantage_T
    metrics = {"ratio": ratio_T, "clip_frac": (kept_T != ratio_T).to(ratio_T.dtype)}
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T, metrics=metrics)
