"""Every key must be known: an unknown one is refused with the key that was probably meant."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from megatron_plugin.config.aliases import ALIASES
from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.megatron_fields import CHOICES, OURS, RESERVED, model_fields, settable
from megatron_plugin.config.schema import Config

__all__ = ["key_types", "stays_text", "wrong_keys"]

FREE = ("loss",)  # its keys are the parameters of the chosen loss, which `bind` compares with its signature


@functools.cache
def key_types() -> dict[str, Any]:
    """{dotted key: type} of all keys but those of `model` and `loss`, in the order of the schema; a section's own entry is its class."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if name == "sources":
            continue
        section = next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)
        found[name] = section or kind
        if section:
            hints = get_type_hints(section)
            found |= {f"{name}.{f.name}": hints[f.name] for f in fields(section)}
    return found


def stays_text(key: str, value: str) -> bool:
    """Whether the bare word that an override gives a key, or an alias, is text, though YAML may read a truth value or a number: data.tokenizer=no."""
    kind = key_types().get(ALIASES[key].key if key in ALIASES else key)
    return kind in (str, list[str]) and value != "null" and re.fullmatch(r"[\w.+-]+", value) is not None


def wrong_keys(values: dict[Any, Any], where: Callable[[str], str]) -> list[ConfigError]:
    """One error for each key that is not in the schema, or is there with a value where a section belongs.

    `where` tells the origin of a dotted key."""
    known, found = key_types(), []
    for name, value in values.items():
        if name not in known or "." in str(name):
            found.append(_unknown(str(name), known, where))
        elif name in ("model", *FREE) or is_dataclass(known[name]):
            if value is not None and not isinstance(value, dict):
                inside = ", ".join(_siblings(name, known)[:6])
                found.append(ConfigError(f"got {value!r}, expected keys below it ({inside}, ...)", name, where(name)))
            inner = value if isinstance(value, dict) else {}  # None: "train:" with nothing below it
            found += [error for key in inner if (error := _wrong_inner(name, str(key), known, where))]
    return found


def _wrong_inner(section: str, key: str, known: dict[str, Any], where: Callable[[str], str]) -> ConfigError | None:
    dotted = f"{section}.{key}"
    if section == "model":
        return _wrong_model_key(key, known, where)
    return _unknown(dotted, known, where) if section not in FREE and dotted not in known else None


def _wrong_model_key(key: str, known: dict[str, Any], where: Callable[[str], str]) -> ConfigError | None:
    dotted = f"model.{key}"
    annotation = None if key in OURS or key in RESERVED else model_fields().get(key)
    if annotation is None:
        return _unknown(dotted, known, where)
    if key not in CHOICES and not settable(annotation):
        return ConfigError("got a field that takes a Python object, expected one that YAML can hold: leave it out", dotted, where(dotted))
    return None


def _unknown(key: str, known: dict[str, Any], where: Callable[[str], str]) -> ConfigError:
    leaf = key.rpartition(".")[2]
    if leaf in OURS:
        return ConfigError(f"got Megatron's own name, expected ours: use '{OURS[leaf]}'", key, where(key))
    if leaf in RESERVED:
        return ConfigError(f"got a field that cannot be set ({RESERVED[leaf]}), expected it to be left out", key, where(key))
    if key in known:  # a flat "train.steps: 5" in a file
        section, _, inner = key.partition(".")
        return ConfigError(f"got a key with a dot, expected '{inner}:' indented below '{section}:'", key, where(key))
    near = _nearest(key, known)
    hint = f"did you mean '{near}'?" if near else f"expected one of {', '.join(_siblings(key.rpartition('.')[0], known))}"
    return ConfigError(f"got an unknown key; {hint}", key, where(key))


def _siblings(section: str, known: dict[str, Any]) -> list[str]:
    if section == "model":
        return ["the fields of megatron-core's TransformerConfig"]
    if section in FREE:
        return [f"{section}.name", "the parameters of the loss"]
    inside = [key for key in known if key.startswith(f"{section}.")]
    return inside or [key for key in known if "." not in key]


def _nearest(key: str, known: dict[str, Any]) -> str | None:
    """The likeliest of all keys: the same name in another section, then a similar one in the same section, then a similar one anywhere."""
    section, _, leaf = key.rpartition(".")
    every = [*known, "loss.name", *(f"model.{name}" for name in model_fields() if name not in OURS and name not in RESERVED)]
    if same := [full for full in every if full.rpartition(".")[2] == leaf]:
        return same[0]
    for names in ([full for full in every if full.rpartition(".")[0] == section], every):
        by_leaf: dict[str, str] = {}
        for full in names:
            by_leaf.setdefault(full.rpartition(".")[2], full)
        if near := difflib.get_close_matches(leaf.lower(), by_leaf, n=1, cutoff=0.7):
            return by_leaf[near[0]]
    return None
