"""Entropy-adaptive fine-tuning.  T: tokens of this call, V: vocabulary; sg: stop-gradient."""

from __future__ import annotations

from torch import Tensor

from megatron_plugin.losses.algebra import as_scalar, check_number, weighted_nll
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms


def eaft(stats: TokenStats, inputs: TokenInputs, *, vocab_size: int | Tensor, alpha: float | Tensor = 1.0) -> TokenTerms:
    """EAFT, -sg((H / log V)^alpha) log p: trust the label where the model is unsure.

    [T] nats.  H is the exact row entropy and V the true vocabulary without padding (`TokenLoss.for_vocabulary` fills it in), as in IDFT's
    repository except for its padded V; LLaMA-Factory divides the entropy of the renormalised top 20 by 3.0 instead, another number.
    alpha = 0 is SFT.  ValueError for vocab_size < 2 or alpha < 0.
    """
    check_number("eaft", "vocab_size", vocab_size, low=2)
    check_number("eaft", "alpha", alpha, low=0)
    entropy_T = stats.entropy.detach().clamp(min=0)  # rounding below 0 would be NaN under a fractional alpha
    weight_T = (entropy_T / as_scalar(vocab_size, entropy_T).log()) ** alpha
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T)
