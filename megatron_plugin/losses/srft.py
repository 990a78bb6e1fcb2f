"""SRFT's supervised term.  T: tokens of this call; sg: stop-gradient."""

from __future__ import annotations

from torch import Tensor

from megatron_plugin.losses.algebra import INF, check_number, weighted_nll
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms


def srft_demo(
    stats: TokenStats, inputs: TokenInputs, *, entropy_sign: float | Tensor = -1.0, max_weight: float | Tensor = INF
) -> TokenTerms:
    """SRFT on demonstrations, -sg(0.5 e^(entropy_sign H)) log p (arXiv 2506.19767, eq. 8 to 13, the L_SFT term).

    [T] nats.  Paper and released code contradict each other: the paper has e^(-H) (entropy_sign = -1, the default), the code
    `entropy.exp()` with 0.5 outside (entropy_sign = +1).  The code's weight reaches V / 2 (75 968 at V = 151 936): clamp with `max_weight`.
    H is per token, as in the code; the paper writes the entropy of the policy.
    ValueError for an entropy_sign that is neither -1 nor +1 or a max_weight that is not positive.
    """
    check_number("srft_demo", "entropy_sign", entropy_sign)
    if not isinstance(entropy_sign, Tensor) and entropy_sign not in (-1, 1):
        raise ValueError(f"loss 'srft_demo': got entropy_sign={entropy_sign!r}, expected -1 (the paper) or +1 (the released code)")
    check_number("srft_demo", "max_weight", max_weight, above=0, infinite=True)
    weight_T = (0.5 * (entropy_sign * stats.entropy.detach()).exp()).clamp(max=max_weight)
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T)
