"""Terms that can be added to any loss.  T: tokens of this call."""

from __future__ import annotations

from torch import Tensor

from megatron_plugin.kernels.token_stats import TokenStats

__all__ = ["REGULARISERS", "entropy_bonus", "z_loss"]


def entropy_bonus(stats: TokenStats, *, coefficient: float | Tensor) -> Tensor:
    """-coefficient H, [T] nats: rewards an open distribution; dF/dH = -coefficient, nothing through logp."""
    return -coefficient * stats.entropy


def z_loss(stats: TokenStats, *, coefficient: float | Tensor) -> Tensor:
    """coefficient lse^2, [T] nats squared: keeps the log-partition near 0 (PaLM, arXiv 2204.02311, sec. 5, with 1e-4)."""
    return coefficient * stats.lse.square()


REGULARISERS = {"entropy_bonus": entropy_bonus, "z_loss": z_loss}
