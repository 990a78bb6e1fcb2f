"""The Hugging Face face of a run: the config.json that its weights have there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_plugin.data import load_tokenizer
from megatron_plugin.hooks.weights import hf_config_of, read_hf_config
from megatron_plugin.trainer.checkpoint import CheckpointError, find_checkpoint

__all__ = ["hf_config_for", "run_values"]


def hf_config_for(run: Path, values: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], Path | None]:
    """(config.json, the directory it is from) of a run directory whose configuration is `values`: that of the model which was imported at the
    beginning of the chain of checkpoint.init; where there is none, one made from `values`, with the ids of the tokenizer's control tokens,
    and None.  WeightsError where no Llama, Qwen2 or Qwen3 is built so."""
    if origin := _origin(run, values):
        return read_hf_config(origin), origin
    length = (values.get("data") or {}).get("seq_length", 512)
    tokenizer = load_tokenizer(run / "tokenizer")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return hf_config_of(values["model"], vocab_size=vocab_size, max_positions=length) | ids, None


def run_values(run: Path) -> dict[str, Any]:
    """config.yaml of a run directory, as it is."""
    try:
        values = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{run / 'config.yaml'}: cannot be read ({error}), expected the run's configuration beside its checkpoints/") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise CheckpointError(f"{run / 'config.yaml'}: got no section 'model', expected the run's configuration")
    return values


def _origin(run: Path, values: dict[str, Any]) -> Path | None:
    """The directory with config.json of the import at the beginning of the chain of checkpoint.init; None where it leads to none."""
    for _ in range(100):
        if (run / "tokenizer" / "config.json").is_file():
            return run / "tokenizer"
        init = (values.get("checkpoint") or {}).get("init")
        if not init:
            return None
        try:
            run = find_checkpoint(init).parent.parent
            values = run_values(run)
        except CheckpointError:
            return None
    return None
