"""Estimates of KL(policy || reference) from one sampled token.  T: tokens of this call."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KL_ESTIMATORS", "LOG_RATIO_MAX", "kl_estimate"]

LOG_RATIO_MAX = 20.0  # nats, as verl and Trinity: e^20 is finite in fp32 and far outside every clip


def _k1(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    return logp_T - ref_logp_T


def _k2(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    return 0.5 * (logp_T - ref_logp_T).square()


def _k3(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    log_ratio_T = (ref_logp_T - logp_T).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    return torch.expm1(log_ratio_T) - log_ratio_T  # e^x - 1 - x; with exp(x) - 1 the small ones would be rounding noise, and negative


KL_ESTIMATORS = {"k1": _k1, "k2": _k2, "k3": _k3, "k1+": _k1, "k3+": _k3}
"""Name -> value.  With "+" the gradient is that of k2 (straight-through)."""


def kl_estimate(logp_T: Tensor, ref_logp_T: Tensor, estimator: str) -> Tensor:
    """k1, k2 or k3 of Schulman's note "Approximating KL divergence", [T] nats, with l = logp and l_ref = ref_logp:

              value                        dF/dlogp             of a token drawn from the policy
        k1    l - l_ref                    1                    unbiased value, but a gradient that is 0 on average: no use as a loss term
        k2    (l - l_ref)^2 / 2            l - l_ref            biased value, the unbiased gradient of KL(policy || reference)
        k3    e^(l_ref - l) - 1 - l_ref + l    1 - e^(l_ref - l)    unbiased value, >= 0; the gradient of KL(reference || policy) where sampled
        k1+, k3+   that value with k2's gradient, as verl's "+"

    k3's log-ratio is held to +-20 nats, beyond which it has no gradient; verl also holds its value to 10, which is not copied.
    """
    value_T = KL_ESTIMATORS[estimator](logp_T, ref_logp_T)
    if not estimator.endswith("+"):
        return value_T
    passed_T = _k2(logp_T, ref_logp_T)
    return value_T.detach() + (passed_T - passed_T.detach())
