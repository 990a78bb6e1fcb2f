"""The weight of a token that another program sampled: the rollout engine's policy is not quite the trainer's.  T: tokens of this call."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_plugin.losses.algebra import INF
from megatron_plugin.losses.kl import LOG_RATIO_MAX

__all__ = ["mismatch_weight"]


def mismatch_weight(
    old_logp_T: Tensor, rollout_logp_T: Tensor, *, tis: float | Tensor = INF, icepop_low: float | Tensor = 0.0, icepop_high: float | Tensor = INF
) -> tuple[Tensor, Tensor]:
    """(w, cut), [T] each, detached: w = p_old / p_rollout, truncated and cut to a band; cut is 1 where w is not that ratio.

    tis (TIS, truncated importance sampling): w = min(ratio, tis).  icepop_low, icepop_high (IcePop): w = 0 outside the band, the ratio
    inside.  Three policies are kept apart: p_rollout drew the token, p_old is the trainer's before the first update on it, and the
    policy gradient's own ratio is p / p_old.  A NaN stays NaN: a missing log-probability must show.
    """
    ratio_T = (old_logp_T.detach() - rollout_logp_T).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    weight_T = torch.where((ratio_T < icepop_low) | (ratio_T > icepop_high), 0.0, ratio_T.clamp(max=tis))
    return weight_T, (weight_T != ratio_T).to(ratio_T.dtype)
