"""The clipped policy gradient of GRPO, token level.  T: tokens of this call."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_plugin.losses.algebra import check_number
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms

LOG_RATIO_MAX = 20.0  # nats, as verl and Trinity: e^20 is finite in fp32 and far outside every clip


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
    Metrics: ratio (r), clip_frac (1 where clipped).
    ValueError without advantage, for clip_low outside [0, 1], clip_high < 0 or dual_clip <= 1.
    """
    check_number("grpo", "clip_low", clip_low, low=0, high=1)
    check_number("grpo", "clip_high", clip_high, low=0, infinite=True)
    check_number("grpo", "dual_clip", dual_clip, above=1, infinite=True)
    advantage_T = inputs.require("advantage", "grpo").to(stats.logp.dtype)
    old_logp_T = stats.logp.detach() if inputs.old_logp is None else inputs.old_logp
    ratio_T = (stats.logp - old_logp_T).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    # The minimum, branch by branch: only the upper bound can bind for A >= 0, only the lower one and the dual clip for A < 0.
    # clamp passes the gradient at a bound, where min and max would halve it.
    kept_T = torch.where(advantage_T < 0, ratio_T.clamp(min=1 - clip_low).clamp(max=dual_clip), ratio_T.clamp(max=1 + clip_high))
    metrics = {"ratio": ratio_T.detach(), "clip_frac": (kept_T != ratio_T).to(ratio_T.dtype)}
    return TokenTerms(loss=-advantage_T * kept_T, metrics=metrics)
