"""Bytes that one rank hands to torch.distributed in a step, by what they are for: what a tensor of the call has, not what a ring makes of it.

    s tokens of a row, b rows of a micro-batch, m micro-batches of a rank, H hidden, N tokens of the rank with a loss
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.model import BF16, FP32, Layout, Model, stage_parameters

__all__ = ["STATISTICS", "Batch", "Traffic", "traffic"]

STATISTICS = 16
"""Bytes of a token's four fp32 numbers (m2, s, t, z_y), which tensor-parallel ranks gather instead of logits."""
CHUNK = 4096
"""Tokens that pass the head together at most: each chunk gathers a row more, with the columns of each shard (parallel/vocab.py)."""


@dataclass(frozen=True)
class Batch:
    """Of one rank."""

    rows: int
    length: int
    micro_batches: int
    head_tokens: tuple[int, ...] = ()
    """Tokens with a loss in each micro-batch; (): all."""

    @property
    def through_head(self) -> tuple[int, ...]:
        return self.head_tokens or (self.rows * self.length,) * self.micro_batches


@dataclass(frozen=True)
class Traffic:
    """Bytes a step."""

    layers: float
    """All-reduced by tensor parallelism: the output of the embedding, of every attention and MLP, forward, and of the two latter backward.  With
    parallel.sequence as many, as a reduce-scatter and an all-gather each."""
    head: float
    """All-reduced: the head's gradient of the hidden states, of tokens with a loss only."""
    statistics: float
    """All-gathered, as received: the loss."""
    stages: float
    """Sent to the next pipeline stage; as much comes back."""
    gradients: float
    """Summed over the replicas, fp32: all-reduced, or reduce-scattered with the distributed optimizer."""
    weights: float
    """All-gathered by the distributed optimizer, as received."""


def traffic(model: Model, layout: Layout, batch: Batch, stage: int = 0, *, bf16: bool = True) -> Traffic:
    size, last, split = BF16 if bf16 else FP32, stage == layout.pipeline - 1, layout.tensor > 1
    whole = batch.micro_batches * batch.rows * (batch.length // layout.context) * model.sizes.hidden * size
    layers = model.sizes.layers // layout.pipeline
    gathered = sum(tokens + -(-tokens // CHUNK) for tokens in batch.through_head)
    count, many, zero = stage_parameters(model, layout, stage), layout.replicas > 1, layout.distributed_optimizer
    return Traffic(
        layers=whole * (4 * layers + (stage == 0)) * split,
        head=sum(batch.through_head) * model.sizes.hidden * size * split * last,
        statistics=gathered * STATISTICS * layout.tensor * split * last,
        stages=whole * (not last),
        gradients=count * FP32 * many,
        weights=count * size * (many and zero),
    )
