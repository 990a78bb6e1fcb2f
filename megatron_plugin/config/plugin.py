"""The YAML file that `--plugin-config` names, for training scripts that are not ours: a loss, and how its head is computed.

    loss: {name: chord_phi}                 # and its parameters
    head: {vocab_size: 151643}
    one_pass: true

Imports neither torch nor megatron.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.load import describe, read_file

__all__ = ["HeadConfig", "PlanConfig", "PluginConfig", "load_plugin_config"]


@dataclass(frozen=True)
class HeadConfig:
    """What the model's own output layer does not say of itself (ops.Head)."""

    vocab_size: int | None = None
    """True vocabulary; columns at or beyond it are padding and masked.  Empty: all columns count, as in Megatron's own loss."""
    softcap: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class PlanConfig:
    """How the op computes (ops.Plan)."""

    chunk_tokens: int | None = None
    logits_dtype: Literal["fp32", "bf16"] | None = None
    min_weight: float = 0.0
    """one_pass only."""


@dataclass(frozen=True)
class PluginConfig:
    """`load_plugin_config` makes it."""

    loss: dict[str, Any] = field(default_factory=lambda: {"name": "sft"})
    """name: one of megatron_plugin.LOSSES or package.module.function; every other key is a parameter of that loss."""
    head: HeadConfig = field(default_factory=HeadConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    one_pass: bool = False
    """Form gradients in the forward: 3 GEMMs at the head instead of 4.  The plugin's loss_func takes the place of the script's."""


def load_plugin_config(path: str | Path) -> PluginConfig:
    """The checked file.  ConfigError names the key, its line, what was got and expected; the loss itself is checked by `bind`."""
    layer = read_file(Path(path))
    _check_keys(layer.values, PluginConfig, "", layer.where)
    sections: dict[Any, Any] = {name: {} for name, value in layer.values.items() if value is None}  # "head:" with nothing below it
    values = layer.values | sections
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PluginConfig), OmegaConf.create(values)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        kind = _kinds(PluginConfig).get(key)
        reason = f"got {OmegaConf.select(OmegaConf.create(values), key)!r}, expected {describe(kind)}" if kind else str(error).split("\n")[0]
        raise ConfigError(reason, key or None, layer.where(key)) from error
    name = config.loss.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"got {name!r}, expected the name of a loss, such as dft", "loss.name", layer.where("loss.name"))
    return config


def _kinds(schema: type, prefix: str = "") -> dict[str, Any]:
    """{dotted key: type, None left out of unions}."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(schema).items():
        kind = next((part for part in get_args(kind) if part is not type(None)), kind) if type(None) in get_args(kind) else kind
        found |= _kinds(kind, f"{prefix}{name}.") if is_dataclass(kind) and isinstance(kind, type) else {f"{prefix}{name}": kind}
    return found


def _check_keys(values: dict[Any, Any], schema: type, prefix: str, where: Callable[[str], str]) -> None:
    hints, known = get_type_hints(schema), [f.name for f in fields(schema)]
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            near = difflib.get_close_matches(str(name).lower(), known, n=1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"expected one of {', '.join(known)}"
            raise ConfigError(f"got an unknown key; {hint}", key, where(key))
        section = is_dataclass(hints[name])
        if (section or name == "loss") and value is not None and not isinstance(value, dict):
            raise ConfigError(f"got {value!r}, expected keys below it", key, where(key))
        if section and value:
            _check_keys(value, hints[name], f"{key}.", where)
