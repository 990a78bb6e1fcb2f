"""How probable the trained tokens are, as a histogram: DFT and its kin drive it apart into two heaps (arXiv 2508.05629, figure 3)."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["PROBABILITY_METRICS", "probability_counts"]

PERCENT = tuple(range(10, 100, 10))
PROBABILITY_METRICS = tuple(f"p_below_{percent}" for percent in PERCENT)


def probability_counts(logp: Tensor) -> dict[str, Tensor]:
    """{name of PROBABILITY_METRICS: tokens with p < 0.1, < 0.2, ... < 0.9}, 0-d fp32 each; over the tokens they are shares.

    logp: any shape, nats, 0 where a token is masked (LossOutput.per_token), so that it counts nowhere; NaN neither."""
    return {name: (logp < math.log(percent / 100)).sum().float() for name, percent in zip(PROBABILITY_METRICS, PERCENT, strict=True)}
