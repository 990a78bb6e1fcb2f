"""LUFFY's shaped off-policy objective.  T: tokens of this call."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_plugin.losses.algebra import as_scalar, check_number
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms


def luffy(stats: TokenStats, inputs: TokenInputs, *, gamma: float | Tensor = 0.1) -> TokenTerms:
    """LUFFY, -A p / (p + gamma): the ratio of a demonstration, its own policy taken as 1, shaped (ElliottYan/LUFFY, `p_div_p_0.1`).

    [T], no unit.  Differentiated through p on purpose, dF/dlogp = -A gamma p / (p + gamma)^2: there is no weight to detach, so `weight`
    is None.  A is inputs.advantage, 1 without it.  ValueError for gamma <= 0 (at 0 the loss is constant and nothing would be learnt).
    """
    check_number("luffy", "gamma", gamma, above=0)
    # p / (p + gamma) = sigmoid(log p - log gamma): no quotient of underflowed numbers, exact to the smallest p
    shaped_T = torch.sigmoid(stats.logp - as_scalar(gamma, stats.logp).log())
    if inputs.advantage is None:
        return TokenTerms(loss=-shaped_T)
    return TokenTerms(loss=-inputs.advantage.to(shaped_T.dtype) * shaped_T)
