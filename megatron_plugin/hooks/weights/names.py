"""Which Hugging Face tensors a parameter of megatron-core's GPTModel is made of.  One table, for both namings of its layers:

    local spec                    Transformer Engine spec                             Hugging Face
    input_layernorm.weight        self_attention.linear_qkv.layer_norm_weight         input_layernorm.weight
    pre_mlp_layernorm.weight      mlp.linear_fc1.layer_norm_weight                    post_attention_layernorm.weight
    self_attention.linear_qkv     =                                                   self_attn.{q,k,v}_proj
    mlp.linear_fc1                =                                                   mlp.{gate,up}_proj

Layers and experts are counted over the whole model, from 0.  Shapes are Hugging Face's, of the whole tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_plugin.hooks.weights.errors import WeightsError

__all__ = ["Dims", "Part", "Rule", "expected_tensors", "rule_of"]


@dataclass(frozen=True)
class Dims:
    """The sizes that names and shapes depend on."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    """Rows of Hugging Face's embedding, without megatron-core's padding."""
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    expert_ffn: int = 0

    @classmethod
    def of(cls, transformer: dict[str, Any], *, tied: bool, vocab: int) -> Dims:
        """From fields of TransformerConfig by name."""
        t = transformer
        return cls(layers=t["num_layers"], hidden=t["hidden_size"], heads=t["num_attention_heads"], groups=t["num_query_groups"],
                   head_dim=t["kv_channels"], ffn=t["ffn_hidden_size"], vocab=vocab, tied=tied, qkv_bias=t["add_qkv_bias"],
                   qk_norm=t["qk_layernorm"], experts=t.get("num_moe_experts") or 0, expert_ffn=t.get("moe_ffn_hidden_size") or 0)  # fmt: skip


@dataclass(frozen=True)
class Part:
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """How a parameter is made: its Hugging Face tensors, and how they are laid out and cut over tensor-parallel ranks (slices.py)."""

    parts: tuple[Part, ...]
    split: Literal["whole", "rows", "columns", "gate_up", "qkv"]
    is_expert: bool = False


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# SequentialMLP has a module per expert; TEGroupedMLP has a weight per expert
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))")
_NORMS = {
    "input_layernorm.weight": "input_layernorm",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
    "pre_mlp_layernorm.weight": "post_attention_layernorm",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
}


def rule_of(name: str, dims: Dims) -> Rule:
    """The rule of a parameter.  WeightsError for one that no Llama or Qwen has (an adapter, a bias, a multi-token-prediction head)."""
    embedding = Part("model.embed_tokens.weight", (dims.vocab, dims.hidden))
    top = {
        "embedding.word_embeddings.weight": Rule((embedding,), "rows"),
        # tied, the last pipeline stage has a copy of the first one's embedding
        "output_layer.weight": Rule((embedding if dims.tied else Part("lm_head.weight", embedding.shape),), "rows"),
        "decoder.final_layernorm.weight": Rule((Part("model.norm.weight", (dims.hidden,)),), "whole"),
    }
    if name in top:
        return top[name]
    if found := _LAYER.fullmatch(name):
        inner, prefix = found[2], f"model.layers.{found[1]}."
        if rule := _attention(inner, prefix, dims) or _mlp(inner, prefix, dims):
            return rule
    raise WeightsError(f"got the parameter {name}, expected those of a Llama, Qwen2 or Qwen3: it has no Hugging Face tensor there; "
                       "merge adapters before, leave out multi-token prediction and biases")  # fmt: skip


def _attention(inner: str, prefix: str, dims: Dims) -> Rule | None:
    attention, q, kv = prefix + "self_attn.", dims.heads * dims.head_dim, dims.groups * dims.head_dim
    if inner in _NORMS:
        return Rule((Part(f"{prefix}{_NORMS[inner]}.weight", (dims.hidden,)),), "whole")
    if inner == "self_attention.linear_qkv.weight":
        return Rule(tuple(Part(f"{attention}{x}_proj.weight", (n, dims.hidden)) for x, n in (("q", q), ("k", kv), ("v", kv))), "qkv")
    if inner == "self_attention.linear_qkv.bias" and dims.qkv_bias:
        return Rule(tuple(Part(f"{attention}{x}_proj.bias", (n,)) for x, n in (("q", q), ("k", kv), ("v", kv))), "qkv")
    if inner == "self_attention.linear_proj.weight":
        return Rule((Part(f"{attention}o_proj.weight", (dims.hidden, q)),), "columns")
    if inner in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight") and dims.qk_norm:
        return Rule((Part(attention + ("q_norm" if ".q_" in inner else "k_norm") + ".weight", (dims.head_dim,)),), "whole")
    return None


def _mlp(inner: str, prefix: str, dims: Dims) -> Rule | None:
    if not dims.experts:
        return _two_layers(inner, prefix + "mlp.", dims.ffn, dims.hidden) if inner.startswith("mlp.linear_fc") else None
    if inner == "mlp.router.weight":
        return Rule((Part(f"{prefix}mlp.gate.weight", (dims.experts, dims.hidden)),), "whole")
    if found := _EXPERT.fullmatch(inner):
        expert, layer = found[1] or found[4], found[2] or found[3]
        return _two_layers(f"mlp.{layer}.weight", f"{prefix}mlp.experts.{expert}.", dims.expert_ffn, dims.hidden, is_expert=True)
    return None


def _two_layers(inner: str, prefix: str, ffn: int, hidden: int, is_expert: bool = False) -> Rule | None:
    if inner == "mlp.linear_fc1.weight":
        return Rule((Part(prefix + "gate_proj.weight", (ffn, hidden)), Part(prefix + "up_proj.weight", (ffn, hidden))), "gate_up", is_expert)
    if inner == "mlp.linear_fc2.weight":
        return Rule((Part(prefix + "down_proj.weight", (hidden, ffn)),), "columns", is_expert)
    return None


def expected_tensors(dims: Dims) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: shape} of the whole model, in the order of the layers."""
    return {part.name: part.shape for name in _parameters(dims) for part in rule_of(name, dims).parts}


def _parameters(dims: Dims) -> Iterator[str]:
    """Every parameter under its name in the local spec."""
    yield "embedding.word_embeddings.weight"
    for layer in range(dims.layers):
        inside = ["input_layernorm.weight", "self_attention.linear_qkv.weight"]
        inside += ["self_attention.linear_qkv.bias"] * dims.qkv_bias
        inside += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"] * dims.qk_norm
        inside += ["self_attention.linear_proj.weight", "pre_mlp_layernorm.weight", *(["mlp.router.weight"] if dims.experts else [])]
        mlps = [f"mlp.experts.local_experts.{i}" for i in range(dims.experts)] or ["mlp"]
        inside += [f"{mlp}.linear_fc{i}.weight" for mlp in mlps for i in (1, 2)]
        yield from (f"decoder.layers.{layer}.{name}" for name in inside)
    yield "decoder.final_layernorm.weight"
    yield "output_layer.weight"
