"""Supervised fine-tuning.  T: tokens of this call."""

from __future__ import annotations

from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms


def sft(stats: TokenStats, inputs: TokenInputs) -> TokenTerms:
    """SFT, -log p: [T] nats; cross-entropy against the label, every token with weight 1."""
    return TokenTerms(loss=-stats.logp)
