"""The published models and the layouts of docs/scale.md."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.cluster import Rollout
from benchmarks.scale.model import Layout, Model
from benchmarks.scale.traffic import Batch
from megatron_plugin.trainer.flops import GPTSizes

__all__ = ["CASES", "MODELS", "PUBLISHED", "Case"]

MODELS = {
    "7B": Model("Qwen2.5-7B", GPTSizes(28, 3584, 28, 4, 128, 18944, True, 152_064), qkv_bias=True),
    "8B": Model("Llama-3-8B", GPTSizes(32, 4096, 32, 8, 128, 14336, True, 128_256)),
    "32B": Model("Qwen2.5-32B", GPTSizes(64, 5120, 40, 8, 128, 27648, True, 152_064), qkv_bias=True),
    "70B": Model("Llama-3-70B", GPTSizes(80, 8192, 64, 8, 128, 28672, True, 128_256)),
}
PUBLISHED = {"7B": 7_615_616_512, "8B": 8_030_261_248, "32B": 32_763_876_352, "70B": 70_553_706_496}
"""Parameters by the models' own index files."""


@dataclass(frozen=True)
class Case:
    model: str
    layout: Layout
    batch: Batch
    packed: bool
    """data.packing, and with it all layers recomputed: the attention matrices would not fit."""
    rollout: Rollout

    @property
    def step_tokens(self) -> int:
        return self.batch.rows * self.batch.length * self.batch.micro_batches * self.layout.data


def _case(model: str, gpus: int, tensor: int, pipeline: int, *, rows: int, packed: bool) -> Case:
    """`rows` of 8192 tokens in a step, one in a micro-batch."""
    data = gpus // (tensor * pipeline)
    return Case(model, Layout(tensor, pipeline, 1, data, True), Batch(1, 8192, rows // data), packed, ENGINES[model])


ENGINES = {"7B": Rollout(1, 128, 4096), "32B": Rollout(2, 128, 4096), "70B": Rollout(4, 128, 4096)}
CASES = [
    _case("7B", 64, 2, 1, rows=256, packed=True),
    _case("7B", 64, 2, 1, rows=256, packed=False),
    _case("7B", 128, 2, 1, rows=512, packed=False),
    _case("32B", 64, 8, 1, rows=256, packed=True),
    _case("32B", 256, 8, 1, rows=1024, packed=False),
    _case("70B", 128, 8, 4, rows=256, packed=True),
    _case("70B", 256, 8, 4, rows=512, packed=False),
    _case("70B", 1024, 8, 4, rows=2048, packed=False),
]
