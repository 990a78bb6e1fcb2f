"""Parameters and bytes of a GPT over the ranks of a layout.  No torch: sizes in, bytes out."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_plugin.trainer.flops import GPTSizes

__all__ = ["Held", "Layout", "Model", "held", "parameters", "stage_parameters"]

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Model:
    """A dense decoder with RMSNorm and without biases, but for those of Q, K and V."""

    name: str
    sizes: GPTSizes
    qkv_bias: bool = False
    tied: bool = False
    padded: int = 0
    """Columns of the embedding in Megatron; 0: the true vocabulary."""

    @property
    def columns(self) -> int:
        return self.padded or self.sizes.vocabulary


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    distributed_optimizer: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def replicas(self) -> int:
        """Ranks that a gradient is summed over."""
        return self.data * self.context


@dataclass(frozen=True)
class Held:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def parameters(model: Model) -> int:
    """Of the whole model, with the true vocabulary: what a Hugging Face checkpoint has."""
    return _layer(model, 1) * model.sizes.layers + model.sizes.hidden + model.sizes.vocabulary * model.sizes.hidden * (1 if model.tied else 2)


def stage_parameters(model: Model, layout: Layout, stage: int) -> int:
    """Of one rank of pipeline stage `stage`, with Megatron's padded vocabulary; layers spread evenly."""
    sizes, last = model.sizes, layout.pipeline - 1
    table = model.columns * sizes.hidden // layout.tensor
    found = _layer(model, layout.tensor) * (sizes.layers // layout.pipeline)
    found += table if stage == 0 else 0
    found += sizes.hidden if stage == last else 0  # the last norm
    return found + (table if stage == last and not (model.tied and last == 0) else 0)  # a tied head on a stage of its own is a copy


def _layer(model: Model, tensor: int) -> int:
    """Matrices are split, norms are not."""
    s = model.sizes
    split = s.hidden * s.head * 2 * (s.heads + s.groups) + s.hidden * s.ffn * (3 if s.gated else 2)
    bias = s.head * (s.heads + 2 * s.groups) if model.qkv_bias else 0
    return (split + bias) // tensor + 2 * s.hidden


def held(model: Model, layout: Layout, stage: int = 0, *, bf16: bool = True) -> Held:
    """Weights, fp32 gradients, and Adam's two moments (with bf16 also the fp32 weights), which the distributed optimizer shares out."""
    count = stage_parameters(model, layout, stage)
    state = count * (3 * FP32 if bf16 else 2 * FP32)
    return Held(count * (BF16 if bf16 else FP32), count * FP32, state / (layout.replicas if layout.distributed_optimizer else 1))
