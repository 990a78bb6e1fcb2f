"""CHORD's token weight.  T: tokens of this call; sg: stop-gradient."""

from __future__ import annotations

import torch

from megatron_plugin.losses.algebra import weighted_nll
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms


def chord_phi(stats: TokenStats, inputs: TokenInputs) -> TokenTerms:
    """CHORD-phi, -sg(p (1 - p)) log p: quiet on tokens the model is sure of and on those it finds absurd (arXiv 2508.11408, sec. 4).

    [T] nats.  Only the token loss: the mixture with GRPO, (1 - mu) L_GRPO + mu L_SFT-phi (eq. 3 and 6), is made by `coefficient` and
    `mu_schedule`.  The paper averages over the tokens of the batch; Trinity and ms-swift average micro-batch means, which is not copied.
    Metric phi: the weight, at most 0.25.
    """
    logp_T = stats.logp.detach()
    weight_T = logp_T.exp() * -torch.expm1(logp_T)  # 1 - exp(logp) cancels in fp32 where logp > -1e-7
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T, metrics={"phi": weight_T})
