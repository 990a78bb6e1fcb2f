"""config.json of a Llama, Qwen2, Qwen3 or Qwen3-MoE model <-> the fields of megatron-core's TransformerConfig and GPTModel.

What megatron-core cannot compute as Hugging Face's model does is refused by field: other rotary scalings, sliding windows, biases it lacks.
Imports neither torch nor megatron.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_plugin.hooks.weights.errors import WeightsError

__all__ = ["ModelFields", "hf_config_of", "read_hf_config", "transformer_fields"]

# model_type -> (bias of q, k and v, norm of queries and keys, mixture of experts, head_dim where config.json names none; None: hidden / heads)
KINDS = {
    "llama": (False, False, False, None),
    "qwen2": (True, False, False, None),
    "qwen3": (False, True, False, 128),
    "qwen3_moe": (False, True, True, None),
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
# Fields that change what the model computes and that none of these models has: (the value config.json may have, besides being left out)
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "partial_rotary_factor": 1.0,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "quantization_config": None}  # fmt: skip
# RotaryEmbedding._apply_scaling has these as constants (megatron-core 0.14 to 0.19)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LAYERS_ALIKE = dict(normalization="RMSNorm", gated_linear_unit=True, activation_func="silu", add_bias_linear=False)


@dataclass(frozen=True)
class ModelFields:
    """What megatron-core is told to build the model of a config.json; plain values, as configs/*.yaml has them below `model:`."""

    transformer: dict[str, Any]
    """Of TransformerConfig; activation_func is a name."""
    gpt: dict[str, Any]
    """Of GPTModel, except vocab_size."""
    vocab_size: int
    """Rows of the embedding in Hugging Face's files; megatron-core's may have more (padding)."""
    max_positions: int

    def transformer_arguments(self) -> dict[str, Any]:
        """`transformer` as TransformerConfig(**...) takes it: the activation is torch's function."""
        import torch.nn.functional as F

        return self.transformer | {"activation_func": getattr(F, self.transformer["activation_func"])}


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory.  WeightsError when it is not there or no JSON object."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise WeightsError(f"{file}: got {error.strerror}, expected a Hugging Face model directory with config.json") from error
    except ValueError as error:
        raise WeightsError(f"{file}: got text that is no JSON ({error}), expected a Hugging Face model configuration") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file}: got a JSON {type(config).__name__}, expected an object of model fields")
    return config


def transformer_fields(hf_config: dict[str, Any]) -> ModelFields:
    """The megatron-core fields of a config.json, in the form of transformers 4 (rope_theta) or 5 (rope_parameters).

    WeightsError naming the field for models other than Llama, Qwen2, Qwen3 and Qwen3-MoE, and for what megatron-core computes differently."""
    kind = hf_config.get("model_type")
    if kind not in KINDS:
        _refuse("model_type", kind, f"one of {', '.join(KINDS)}", "other architectures have other tensors; Megatron-Bridge knows more of them")
    for field, value in ONLY.items():
        if (got := hf_config.get(field, value)) != value and got is not None:
            _refuse(field, got, repr(value), "megatron-core's GPTModel is not built this way here")
    qkv_bias, qk_norm, experts, head_dim = KINDS[kind]
    hidden, heads = _whole(hf_config, "hidden_size"), _whole(hf_config, "num_attention_heads")
    transformer = dict(
        num_layers=_whole(hf_config, "num_hidden_layers"), hidden_size=hidden, ffn_hidden_size=_whole(hf_config, "intermediate_size"),
        num_attention_heads=heads, num_query_groups=hf_config.get("num_key_value_heads") or heads,
        kv_channels=hf_config.get("head_dim") or head_dim or hidden // heads, layernorm_epsilon=hf_config.get("rms_norm_eps", 1e-6),
        add_qkv_bias=qkv_bias, qk_layernorm=qk_norm, hidden_dropout=0.0, attention_dropout=hf_config.get("attention_dropout", 0.0),
        **LAYERS_ALIKE, **(_expert_fields(hf_config) if experts else {}),
    )  # fmt: skip
    gpt = _rotary(hf_config) | {"share_embeddings_and_output_weights": bool(hf_config.get("tie_word_embeddings", False))}
    return ModelFields(transformer, gpt, _whole(hf_config, "vocab_size"), hf_config.get("max_position_embeddings") or 2048)


def hf_config_of(model: dict[str, Any], *, vocab_size: int, max_positions: int) -> dict[str, Any]:
    """The inverse: config.json for a `model:` section (plain values of TransformerConfig and GPTModel).  WeightsError naming the field
    when no Llama, Qwen2 or Qwen3 is built so."""
    for field, value in (LAYERS_ALIKE | {"position_embedding_type": "rope", "num_moe_experts": None, "rotary_percent": 1.0}).items():
        default = {"normalization": "LayerNorm", "gated_linear_unit": False, "activation_func": "gelu", "add_bias_linear": True,
                   "position_embedding_type": "learned_absolute"}.get(field, value)  # fmt: skip
        if (got := model.get(field, default)) != value:
            _refuse(f"model.{field}", got, repr(value), "no Llama, Qwen2 or Qwen3 is built so; Hugging Face has no class for this model here")
    bias, norm = model.get("add_qkv_bias", False), model.get("qk_layernorm", False)
    if bias and norm:
        _refuse("model.qk_layernorm", True, "False beside add_qkv_bias=True", "Qwen2 has the bias, Qwen3 the norm")
    kind = "qwen2" if bias else "qwen3" if norm else "llama"
    heads, hidden = model["num_attention_heads"], model["hidden_size"]
    head_dim = model.get("kv_channels") or hidden // heads
    if kind == "qwen2" and head_dim != hidden // heads:
        _refuse("model.kv_channels", head_dim, f"hidden_size / num_attention_heads = {hidden // heads}", "Qwen2 has no other head_dim")
    config = dict(
        architectures=[ARCHITECTURES[kind]], model_type=kind, vocab_size=vocab_size, hidden_size=hidden, head_dim=head_dim,
        intermediate_size=model.get("ffn_hidden_size") or 4 * hidden, num_hidden_layers=model["num_layers"], num_attention_heads=heads,
        num_key_value_heads=model.get("num_query_groups") or heads, hidden_act="silu", rms_norm_eps=model.get("layernorm_epsilon", 1e-5),
        max_position_embeddings=max_positions, rope_theta=float(model.get("rotary_base", 10000)), rope_scaling=None,
        tie_word_embeddings=model.get("share_embeddings_and_output_weights", False), attention_dropout=model.get("attention_dropout", 0.0),
    )  # fmt: skip
    if model.get("rope_scaling"):
        config["rope_scaling"] = {"rope_type": "llama3", "factor": model.get("rope_scaling_factor", 8.0), **LLAMA3}
    return config


def _rotary(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Rotary fields of GPTModel.  In transformers 5 everything is in rope_parameters, in 4 rope_theta stands beside rope_scaling."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10000.0)
    fields = {"position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_base": int(theta) if theta.is_integer() else theta}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse("rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], "1.0", "these models rotate every channel")
    if kind == "default":
        return fields | {"rope_scaling": False}
    if kind != "llama3":
        _refuse("rope_type", kind, "default or llama3", "megatron-core's rotary embedding of a plain GPTModel knows no other scaling")
    for field, value in LLAMA3.items():
        if (got := rope.get(field)) != value:
            _refuse(field, got, str(value), "megatron-core's rope_scaling has it as a constant")
    return fields | {"rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}


def _expert_fields(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Of Qwen3-MoE.  Experts chosen before the softmax have weights that sum to 1: norm_topk_prob."""
    experts = "num_experts" if "num_experts" in hf_config else "num_local_experts"
    return dict(num_moe_experts=_whole(hf_config, experts), moe_router_topk=_whole(hf_config, "num_experts_per_tok"),
                moe_ffn_hidden_size=_whole(hf_config, "moe_intermediate_size"), moe_router_score_function="softmax",
                moe_router_pre_softmax=not hf_config.get("norm_topk_prob", False))  # fmt: skip


def _whole(hf_config: dict[str, Any], field: str) -> int:
    got = hf_config.get(field)
    if not isinstance(got, int) or isinstance(got, bool) or got < 1:
        _refuse(field, got, "a positive whole number", "is this the configuration of a language model?")
    return got


def _refuse(field: str, got: Any, expected: str, remedy: str) -> NoReturn:
    raise WeightsError(f"config.json: {field}: got {got!r}, expected {expected}: {remedy}")
