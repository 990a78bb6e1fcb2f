"""Dynamic fine-tuning and its family, -sg(p^gamma) log p.  T: tokens of this call; sg: stop-gradient."""

from __future__ import annotations

from torch import Tensor

from megatron_plugin.losses.algebra import check_number, weighted_nll
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms


def dft(stats: TokenStats, inputs: TokenInputs) -> TokenTerms:
    """DFT, -sg(p) log p: SFT's gradient without its 1/p importance weight (arXiv 2508.05629, eq. 9).

    [T] nats.  The gradient is that of -p.  Differentiating the weight too would turn its sign where p < 1/e.
    The paper's trainer takes p from a second softmax, averages micro-batch means instead of tokens, and its sequence-parallel branch
    forgets p altogether (it is plain SFT): none of that is copied.
    """
    weight_T = stats.logp.detach().exp()
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T)


def sft_is(stats: TokenStats, inputs: TokenInputs) -> TokenTerms:
    """CHORD's importance-sampling baseline, -sg(p / p_sample) log p with p_sample = 1, exactly `dft` (arXiv 2508.11408, eq. 4)."""
    return dft(stats, inputs)


def gce(stats: TokenStats, inputs: TokenInputs, *, gamma: float | Tensor = 0.7) -> TokenTerms:
    """Generalised cross-entropy, -sg(p^gamma) log p (Zhang and Sabuncu 2018, eq. 6, whose q is gamma; 0.7 is their choice).

    [T] nats.  The same gradient as their (1 - p^gamma) / gamma; the value differs.  gamma = 0 is SFT, gamma = 1 is DFT.
    ValueError when gamma is negative.
    """
    check_number("gce", "gamma", gamma, low=0)
    weight_T = (gamma * stats.logp.detach()).exp()
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T)
