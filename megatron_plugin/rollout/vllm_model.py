"""Which model an engine serves: what is compared with the trainer's before the first weight is sent, and what vLLM cannot serve on a CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_plugin.rollout.engine import WrongModelError

__all__ = ["CPU_HEAD_SIZES", "ModelDescription", "check_cpu_heads", "computation", "context_length", "describe_model", "read_config"]

LONGEST = 32768
"""Tokens of the context where none is asked for, however long the model's own is: an engine reserves key-value cache for it."""

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM 0.32 has CPU kernels for, in fp32, bf16 and fp16: those for which its torch.ops._C.get_scheduler_metadata does not
raise.  (Its cpu_attn.py lists the same without 48, and nothing reads that list; 48 was run, too.)"""


REMEDIES = {
    "dtype": "start it with another --dtype, or set rollout.dtype",
    "max_model_len": "start it with a larger --max-model-len, or lower data.seq_length",
}


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What must be the same in trainer and engine.  None: not compared."""

    architecture: str | None = None
    """Such as "Qwen2ForCausalLM"."""
    vocab_size: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    tied: bool | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    """Tokens the engine must have room for; a larger context is welcome."""
    computation: Mapping[str, Any] | None = None
    """What tensors of the same shapes are computed with (`computation`); an engine that cannot say is not compared."""

    def check(self, served: Mapping[str, Any], engine: str) -> None:
        """WrongModelError for a server (`engine`: its name) that serves something else; `served`: what vllm_plugin.WorkerExtension says of it."""
        for item in fields(self):
            expected, got = getattr(self, item.name), served.get(item.name)
            if expected is None or (got >= expected if item.name == "max_model_len" else got == expected):
                continue
            if item.name == "computation":
                if got is None:
                    continue
                name = next(name for name in expected if got.get(name) != expected[name])
                raise WrongModelError(f"{engine}: got a server whose config.json has {name}={got.get(name)}, expected {expected[name]}: it serves another "
                                      "model than the trainer trains")  # fmt: skip
            remedy = REMEDIES.get(item.name, "it serves another model than the trainer trains")
            raise WrongModelError(f"{engine}: got a server with {item.name}={got}, expected {expected}: {remedy}")


def context_length(config: Mapping[str, Any], asked: int = 0) -> int:
    """Tokens of prompt and answer: those asked for, or with 0 the model's own, at most 32768.  ValueError for more than the model has positions."""
    own = config.get("max_position_embeddings") or 0
    if asked < 0 or (own and asked > own):
        raise ValueError(f"got a context of {asked} tokens, expected at most max_position_embeddings {own} of config.json; leave it out for the model's own")
    return asked or min(LONGEST, own or LONGEST)


def computation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json: what the shapes of its tensors do not tell, with Hugging Face's defaults filled in."""
    heads, rope = config.get("num_attention_heads"), config.get("rope_parameters") or {}
    return {
        "num_attention_heads": heads, "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0), "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "hidden_act": config.get("hidden_act", "silu"),
    }  # fmt: skip


def read_config(model_dir: str) -> dict[str, Any]:
    """Hugging Face's config.json of a folder.  ValueError without one."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"model_dir={model_dir!r}: got no config.json there, expected a folder in Hugging Face's format")
    return json.loads(path.read_text("utf-8"))


def describe_model(model_dir: str, *, dtype: str | None = None, max_model_len: int | None = None) -> ModelDescription:
    """Of a folder with Hugging Face's config.json."""
    config = read_config(model_dir)
    return ModelDescription(
        architecture=config["architectures"][0], vocab_size=config["vocab_size"], hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"], tied=bool(config.get("tie_word_embeddings", False)), dtype=dtype, max_model_len=max_model_len,
        computation=computation(config),
    )  # fmt: skip


def check_cpu_heads(config: Mapping[str, Any]) -> None:
    """ValueError for heads that vLLM's attention cannot serve on a CPU: it would die of them after half a minute of starting.

    Passes what it cannot tell: configurations without heads, and latent attention, which has other kernels."""
    if config.get("kv_lora_rank"):
        return
    size, origin = config.get("head_dim"), "head_dim"
    if not size and config.get("hidden_size") and config.get("num_attention_heads"):
        size, origin = config["hidden_size"] // config["num_attention_heads"], "hidden_size / num_attention_heads"
    if size and size not in CPU_HEAD_SIZES:
        raise ValueError(
            f"got attention heads of size {size} ({origin} of config.json), expected one of {', '.join(map(str, CPU_HEAD_SIZES))}: vLLM has no CPU kernels "
            "for others; give the model heads of such a size (model.kv_channels, or fewer and larger heads), or generate on a GPU"
        )
