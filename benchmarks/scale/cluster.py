"""Time of a step on a cluster that nobody here has: operations over the vendor's peak, bytes over the vendor's bandwidths, and what is
assumed of both.

Every number that comes out is a prediction.  `best` hides all communication but the tensor-parallel, `worst` hides none."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.model import BF16, Layout, Model, held, parameters
from benchmarks.scale.traffic import Batch, traffic

__all__ = ["H200", "Machine", "Rollout", "StepTime", "activation_bytes", "engine_tokens_per_s", "step_time", "transfer_s"]

GIB = 2**30
SCORE_PASSES = 24
"""How often the attention matrix goes through memory where it is made, in forward, recomputation and backward.  Assumed."""


@dataclass(frozen=True)
class Machine:
    """One GPU and its share of the network.  The first five are vendor figures, the last three assumptions."""

    name: str
    flops: float
    """Dense bf16, FLOP/s."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes/s."""
    nvlink: float
    """Bytes/s in one direction, inside a node."""
    network: float
    """Bytes/s in one direction, between nodes."""
    compute_share: float = 0.45
    """Of the peak, in matrix products."""
    bandwidth_share: float = 0.75
    """Of the links."""
    decode_share: float = 0.6
    """Of the memory bandwidth, while an engine decodes."""


H200 = Machine("H200 SXM", flops=989.4e12, memory=141e9, memory_bandwidth=4.8e12, nvlink=450e9, network=50e9)
"""NVIDIA's data sheet: 141 GB, 4.8 TB/s, NVLink 900 GB/s in both directions together; one 400 Gbit/s InfiniBand port per GPU."""


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    compute: float
    scores: float
    """Reading and writing attention matrices, where they are made: packed rows."""
    bubble: float
    tensor: float
    stages: float
    replicas: float

    @property
    def best(self) -> float:
        return self.compute + self.scores + self.bubble + self.tensor

    @property
    def worst(self) -> float:
        return self.best + self.stages + self.replicas


def step_time(model: Model, layout: Layout, batch: Batch, machine: Machine, *, recompute: bool, packed: bool) -> StepTime:
    """Of one optimizer step, bf16, every token with a loss.  recompute: the forward of the layers once more, with its all-reduces.  packed: attention by
    megatron-core's own module, which takes our mask and makes the whole matrix; else a fused one, which makes half of it and keeps none."""
    tokens = batch.rows * batch.length * batch.micro_batches  # of one replica
    sizes = model.sizes
    work = sizes.step(tokens=tokens, length=batch.length, causal=not packed) + recompute * tokens * sizes.forward_token(batch.length / (1 if packed else 2))
    split = layout.tensor * layout.pipeline * layout.context
    compute = work / split / (machine.flops * machine.compute_share)
    matrices = tokens * batch.length * sizes.heads * sizes.layers * BF16 / split  # bytes, over all layers and micro-batches
    scores = packed * SCORE_PASSES * matrices / (machine.memory_bandwidth * machine.bandwidth_share)
    moved, link = traffic(model, layout, batch), machine.bandwidth_share
    again = 1.5 if recompute else 1.0
    ring = 2 * (layout.tensor - 1) / layout.tensor  # bytes that a ring sends for each byte all-reduced
    tensor = ring * (moved.layers * again + moved.head) / (machine.nvlink * link)
    slowest = max((stage_gradients(model, layout, stage) for stage in (0, layout.pipeline - 1)), default=0.0)
    share = (layout.replicas - 1) / layout.replicas
    return StepTime(
        compute=compute,
        scores=scores,
        bubble=(compute + scores + tensor) * (layout.pipeline - 1) / batch.micro_batches,
        tensor=tensor,
        stages=2 * moved.stages / (machine.network * link),
        replicas=share * slowest / (machine.network * link),
    )


def stage_gradients(model: Model, layout: Layout, stage: int) -> float:
    """Bytes of the reduce-scatter of the gradients and the all-gather of the weights of one rank."""
    own = held(model, layout, stage)
    return own.gradients + own.weights


def activation_bytes(model: Model, layout: Layout, batch: Batch, *, recompute: bool, packed: bool) -> float:
    """Of the first stage's rank, bf16, with parallel.sequence: 34 bytes a token and hidden unit of a layer, and where the attention matrix is made 5 bytes
    for each of its places (arXiv 2205.05198, section 4.1); with full recomputation the input of each layer and one layer whole.  As many micro-batches
    as stages are under way."""
    layers, under_way = model.sizes.layers // layout.pipeline, min(layout.pipeline, batch.micro_batches)
    unit = batch.rows * (batch.length // layout.context) * model.sizes.hidden / layout.tensor
    matrix = packed * 5 * batch.rows * (batch.length // layout.context) * batch.length * model.sizes.heads / layout.tensor
    return unit * 2 * layers * under_way + unit * 34 + matrix if recompute else (unit * 34 + matrix) * layers * under_way


def transfer_s(model: Model, machine: Machine) -> float:
    """Seconds to send the weights in bf16 from one leader to its engines: one sender over one network port."""
    return parameters(model) * BF16 / (machine.network * machine.bandwidth_share)


@dataclass(frozen=True)
class Rollout:
    """How engines are used: so many sequences at once in each, so long on average while they grow, on so many GPUs."""

    tensor: int
    sequences: int
    context: int


def engine_tokens_per_s(model: Model, rollout: Rollout, machine: Machine) -> float:
    """Of one engine while it decodes: every step reads the weights and the keys and values of every sequence, or computes, whichever is longer."""
    sizes = model.sizes
    cache = 2 * sizes.layers * sizes.groups * sizes.head * BF16 * rollout.context
    read = (parameters(model) * BF16 + rollout.sequences * cache) / (rollout.tensor * machine.memory_bandwidth * machine.decode_share)
    work = rollout.sequences * (sizes.forward_token(rollout.context) + sizes.head_token()) / (rollout.tensor * machine.flops * machine.compute_share)
    return rollout.sequences / max(read, work)
