"""In-distribution fine-tuning.  T: tokens of this call; sg: stop-gradient."""

from __future__ import annotations

from torch import Tensor

from megatron_plugin.losses.algebra import check_number, weighted_nll
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms


def idft(
    stats: TokenStats,
    inputs: TokenInputs,
    *,
    beta: float | Tensor = 1.0,
    gamma_min: float | Tensor = 0.1,
    gamma_max: float | Tensor = 2.0,
    ramp: float | Tensor = 1.0,
) -> TokenTerms:
    """IDFT, -sg(p^gamma) log p with gamma = 1 + ramp (clamp(e^(-cll / beta), gamma_min, gamma_max) - 1) (arXiv 2602.12222).

    [T] nats; cll = log p + H, the centred log-likelihood: 0 for a typical token, below 0 for one that surprises the model.
    cll = 0 or ramp = 0 is DFT (not SFT), gamma -> 0 is SFT.  `ramp` in [0, 1] is the step's warm-up, called lambda in the paper
    (schedules/ramp.py; the section `ramp` of a configuration).  gamma_max is 2 in the released defaults and 1 in one of its run scripts.

    Not copied from the released code: its FSDP trainer holds gamma fixed but not p (its commit e33b89c), so that the gradient carries
    -p^gamma (1 + gamma log p), which changes sign below p = e^(-1/gamma) and pushes rare labels down; there ramp = 0 is not DFT either.
    Its `adaptive_polylog_loss` detaches the whole loss and trains nothing.  Its clamp of p at 1e-10 inside the logarithm is left out.
    Metric gamma: the exponent.  ValueError for beta <= 0, 0 <= gamma_min <= gamma_max or ramp in [0, 1] broken.
    """
    check_number("idft", "beta", beta, above=0)
    check_number("idft", "gamma_min", gamma_min, low=0)
    check_number("idft", "gamma_max", gamma_max, low=0 if isinstance(gamma_min, Tensor) else gamma_min)
    check_number("idft", "ramp", ramp, low=0, high=1)
    logp_T, entropy_T = stats.logp.detach(), stats.entropy.detach()
    # two clamps: one call takes two numbers or two tensors, and each bound may be either
    gamma_T = (-(logp_T + entropy_T) / beta).exp().clamp(min=gamma_min).clamp(max=gamma_max)
    gamma_T = 1 + ramp * (gamma_T - 1)
    weight_T = (gamma_T * logp_T).exp()  # p**gamma would lose p < 1e-38, where p^0.1 is still 1e-4
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T, metrics={"gamma": gamma_T})
