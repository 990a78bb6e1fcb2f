"""Which model an engine serves: what is compared with the trainer's before the first weight is sent, and what vLLM cannot serve on a CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_plugin.rollout.engine import WrongModelError

__all__ = ["CPU_HEAD_SIZES", "ModelDescription", "check_cpu_heads", "describe_model", "read_config"]

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM 0.32 has CPU kernels for, in fp32, bf16 and fp16: those for which its torch.ops._C.get_scheduler_metadata does not
raise.  (Its cpu_attn.py lists the same without 48, and nothing reads that list; 48 was run, too.)"""


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

    def check(self, served: Mapping[str, Any], engine: str) -> None:
        """WrongModelError for a server (`engine`: its name) that serves something else; `served`: what vllm_plugin.WorkerExtension says of it."""
        for item in fields(self):
            expected, got = getattr(self, item.name), served[item.name]
            if expected is not None and not (got >= expected if item.name == "max_model_len" else got == expected):
                raise WrongModelError(f"{engine}: got a server with {item.name}={got}, expected {expected}: it serves another model than the trainer trains")


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
