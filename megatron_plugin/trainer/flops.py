"""Floating-point operations that training a GPT takes by its sizes alone: no torch, so that docs/scale.md is made with it too.

A matrix product of [m, k] and [k, n] is 2 m k n.  The backward is twice the forward (dX and dW); recomputation is not counted, so a share of
the peak made with it is the model's (MFU), not the hardware's.  Norms, activations, softmax and embeddings are left out, as everywhere:
PaLM, arXiv 2204.02311, appendix B; Megatron-LM, megatron/training/training.py, num_floating_point_operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["GPTSizes"]

BACKWARD = 2
OTHERS = ("multi_latent_attention", "mtp_num_layers", "window_size", "experimental_attention_variant", "heterogeneous_block_specs", "moe_latent_size", "is_hybrid_model")
"""Fields of TransformerConfig with which a layer computes something else."""


@dataclass(frozen=True)
class GPTSizes:
    """Of a GPT with grouped-query attention and a dense or mixture-of-experts MLP."""

    layers: int
    hidden: int
    heads: int
    groups: int
    """Key and value heads."""
    head: int
    """Channels of a head."""
    ffn: int
    gated: bool
    vocabulary: int
    """True one, without padding."""
    experts: tuple[int, int, int] | None = None
    """Of a mixture-of-experts layer: experts a token goes through, width of each, width of the shared one; None: no such layers."""
    expert_layers: int = 0
    """How many of `layers` are."""

    @classmethod
    def of(cls, fields: Any, vocabulary: int) -> GPTSizes | None:
        """Of a TransformerConfig, or a mapping with its names; None for a model that the formula is not of."""
        get = fields.get if isinstance(fields, Mapping) else lambda name, default=None: getattr(fields, name, default)
        if any(get(name) for name in OTHERS):
            return None
        hidden, heads, layers = get("hidden_size"), get("num_attention_heads"), get("num_layers")
        ffn = get("ffn_hidden_size") or 4 * hidden
        experts, sparse = None, 0
        if get("num_moe_experts"):
            experts = (get("moe_router_topk") or 2, get("moe_ffn_hidden_size") or ffn, get("moe_shared_expert_intermediate_size") or 0)
            frequency = get("moe_layer_freq") or 1
            sparse = sum(frequency) if isinstance(frequency, (list, tuple)) else -(-layers // frequency)  # layers 0, frequency, ...
        return cls(layers, hidden, heads, get("num_query_groups") or heads, get("kv_channels") or hidden // heads, ffn,
                   bool(get("gated_linear_unit")), vocabulary, experts, sparse)  # fmt: skip

    def forward_token(self, context: float) -> float:
        """Of one token in the layers.  `context`: tokens that it attends to, s for the whole matrix of a row, s / 2 for its lower half."""
        projections = 2 * self.hidden * self.head * 2 * (self.heads + self.groups)  # Q and output; K and V
        attention = 2 * 2 * self.heads * self.head * context  # QK' and PV
        matrices = 3 if self.gated else 2
        dense = 2 * self.hidden * self.ffn * matrices
        sparse = 0
        if self.experts:
            through, width, shared = self.experts
            sparse = 2 * self.hidden * (through * width + shared) * matrices
        return self.layers * (projections + attention) + (self.layers - self.expert_layers) * dense + self.expert_layers * sparse

    def head_token(self) -> float:
        """Of one token in the output layer, forward."""
        return 2 * self.hidden * self.vocabulary

    def step(self, *, tokens: float, length: int, head_tokens: float | None = None, causal: bool = True) -> float:
        """Forward and backward of `tokens` in rows of `length`.

        head_tokens: those that go through the output layer, which this trainer leaves out where there is no loss; None: all.
        causal: the lower half of the attention matrix is counted, as Megatron-LM does; False: all of it, as PaLM does."""
        body = tokens * self.forward_token(length / 2 if causal else length)
        return (1 + BACKWARD) * (body + (tokens if head_tokens is None else head_tokens) * self.head_token())
