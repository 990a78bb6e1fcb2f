"""What may not change between a checkpoint and the run that takes it, and what may and is said.

Other attention heads or another rotary base give weights of the same shapes another meaning: they load, and the model is ruined silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from megatron.core.transformer import TransformerConfig

from megatron_plugin.config import Config
from megatron_plugin.trainer.checkpoint import CheckpointError

__all__ = ["changed_settings", "model_record", "refuse_other_model"]

ROTARY = ("rotary_base", "rotary_percent", "rope_scaling", "rope_scaling_factor", "seq_len_interpolation_factor")
FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "normalization", "layernorm_epsilon",
    "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias", "gated_linear_unit", "activation_func", "qk_layernorm", "rotary_interleaved",
    "window_size", "softmax_scale", "multi_latent_attention", "num_moe_experts", "moe_router_topk", "mtp_num_layers",
    "apply_residual_connection_post_layernorm",
)  # fmt: skip
"""Of megatron-core's TransformerConfig, with the defaults that it fills in."""
MOVED = ("run_dir", "sources", "checkpoint", "recipe")
"""Settings that do not change what is trained."""


def model_record(config: Config, transformer: TransformerConfig) -> dict[str, Any]:
    """What makes the weights mean what they mean, as JSON has it."""
    record = {name: getattr(transformer, name) for name in FIELDS if hasattr(transformer, name)}
    record["activation_func"] = getattr(transformer.activation_func, "__name__", str(transformer.activation_func))
    gpt = asdict(config.gpt)
    rotary = ROTARY if gpt["position_embedding_type"] == "rope" else ()
    record |= {name: gpt[name] for name in ("position_embedding_type", "share_embeddings_and_output_weights", *rotary)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}


def refuse_other_model(saved: Mapping[str, Any], ours: Mapping[str, Any], *, where: str, allowed: Sequence[str]) -> None:
    """CheckpointError naming every field in which the checkpoint at `where` is of another model; an older one knows fewer, or none."""
    different = [name for name in saved if name in ours and saved[name] != ours[name] and name not in allowed]
    if different:
        named = ", ".join(f"model.{name} {ours[name]}, expected {saved[name]}" for name in different)
        remedy = " ".join(f"model.{name}={saved[name]}" for name in different)
        raise CheckpointError(f"{where} is of another model: got {named}; set {remedy} as then, or, to change the model on purpose, name the fields in "
                              "checkpoint.may_differ")  # fmt: skip


def changed_settings(config: Config, run_dir: Path) -> list[str]:
    """One line for the terminal with what is set otherwise than when `run_dir` was last trained, if anything is; its config.yaml is read."""
    try:
        before = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    before, now = (_flat(values) for values in (before if isinstance(before, dict) else {}, asdict(config)))
    changed = [f"{key} {now[key]} (was {before[key]})" for key in now if key in before and now[key] != before[key]]
    added = [f"{key} {now[key]} (was not set)" for key in now if key not in before and key.startswith(("loss.", "model.", "mu.", "ramp."))]
    return [f"set otherwise than before: {', '.join(changed + added)}"] if changed or added else []


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if not prefix and name in MOVED:
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
