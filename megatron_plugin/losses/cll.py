"""Weights by the centred log-likelihood, cll = log p + H (arXiv 2602.12222).  T: tokens of this call; sg: stop-gradient.

0 for a token that is as likely as the model's own samples are on average, below 0 for one that surprises it: summed over the model's own
distribution cll is exactly 0.  losses/idft.py makes an exponent of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_plugin.losses.algebra import check_number, weighted_nll
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms

__all__ = ["CLL_BELOW", "CLL_METRICS", "cll_counts", "cll_mask", "cll_sigmoid"]

CLL_BELOW = (1, 3, 5)
"""Nats below 0 from which on a token counts as surprising: those of the paper's diagnostics and of its ablation of the hard mask."""
CLL_METRICS = ("cll_above_0", *(f"cll_below_minus_{nats}" for nats in CLL_BELOW))


def cll_counts(logp: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """{name of CLL_METRICS: tokens with cll > 0, < -1, < -3, < -5}, 0-d fp32 each; over the tokens they are shares.

    logp, entropy: any shape, nats, both 0 where a token is masked (LossOutput.per_token), so that it counts nowhere; NaN neither.
    A few operations on one number per token: nothing of the size of the vocabulary is touched."""
    cll = logp + entropy
    counted = [cll > 0, *(cll < -nats for nats in CLL_BELOW)]
    return {name: which.sum().float() for name, which in zip(CLL_METRICS, counted, strict=True)}


def cll_mask(stats: TokenStats, inputs: TokenInputs, *, threshold: float | Tensor = -5.0) -> TokenTerms:
    """SFT on the tokens with cll >= threshold, nothing on the others: -sg(1[cll >= threshold]) log p.

    [T] nats.  The hard mask of the paper's ablation, as read in others' notes of it: -5 helps, -1 takes away too much, -10 lets noise in.
    Masked tokens still count in the mean: the loss is divided by all trained tokens.  ValueError unless threshold is a finite number.
    """
    check_number("cll_mask", "threshold", threshold)
    cll_T = stats.logp.detach() + stats.entropy.detach()
    weight_T = torch.where(cll_T >= threshold, torch.ones_like(cll_T), torch.zeros_like(cll_T))
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T)


def cll_sigmoid(
    stats: TokenStats,
    inputs: TokenInputs,
    *,
    tau: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    w_min: float | Tensor = 0.1,
    w_max: float | Tensor = 1.0,
) -> TokenTerms:
    """-sg(w) log p with w = w_min + (w_max - w_min) sigmoid(-(cll - tau) / temperature): `indomain_cot_loss` of IDFT's repository.

    [T] nats.  Mind the sign: with its defaults, which are these, a token weighs the more the *less* the model would have said it (w_max at
    cll = -inf), the opposite of cll_mask and of IDFT, and of what its name says.  w_min above w_max turns it round.
    ValueError for temperature <= 0, a negative weight, or what is no finite number.
    """
    check_number("cll_sigmoid", "tau", tau)
    check_number("cll_sigmoid", "temperature", temperature, above=0)
    check_number("cll_sigmoid", "w_min", w_min, low=0)
    check_number("cll_sigmoid", "w_max", w_max, low=0)
    cll_T = stats.logp.detach() + stats.entropy.detach()
    weight_T = w_min + (w_max - w_min) * torch.sigmoid(-(cll_T - tau) / temperature)
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T)
