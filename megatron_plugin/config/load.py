"""YAML file + dotted overrides -> Config, and back to YAML with the origin of every value."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from megatron_plugin.config.checks import check
from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.keys import check_keys, key_types
from megatron_plugin.config.recipes import RECIPES
from megatron_plugin.config.schema import Config

__all__ = ["describe", "load_config", "read_file", "save_config", "to_yaml"]

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Layer:
    """One source of values: the file, or one override."""

    values: dict[str, Any]
    name: str
    lines: dict[str, int]

    def where(self, key: str) -> str:
        return f"{self.name}:{self.lines[key]}" if key in self.lines else self.name


def load_config(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Config:
    """The checked configuration of a YAML file with overrides such as "parallel.tensor=2" applied in order.

    `world_size`: ranks of the job, for the checks that need it; None: they are left out.  ConfigError names the key, its origin
    (file:line or command line), what was got and expected."""
    layers = [part for layer in (read_file(Path(path)), *map(_read_override, overrides)) for part in (*_recipe(layer), layer)]
    sources: dict[str, str] = {}
    for layer in layers:
        check_keys(layer.values, layer.where)
        _normalise(layer)
        sources |= {key: layer.where(key) for key in _set_keys(layer.values)}
    config = _typed(OmegaConf.merge(*(OmegaConf.create(layer.values) for layer in layers)), sources)
    if not config.run_dir:
        config = replace(config, run_dir=f"runs/{Path(path).stem}", sources=sources | {"run_dir": "name of the config file"})
    try:
        check(config, world_size)
    except ConfigError as error:
        raise error if error.where else ConfigError(error.reason, error.key, str(path)) from None
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that load_config reads back; values that are not defaults say in a comment where they come from."""
    lines = []
    for name, value in asdict(config).items():
        if name == "sources" or value is None:
            continue
        if not isinstance(value, dict):
            lines += _entry(name, value, 0, config.sources.get(name))
            continue
        lines.append(f"{name}:" if value else f"{name}: {{}}")
        for key, inner in value.items():
            lines += _entry(key, inner, 2, config.sources.get(f"{name}.{key}"))
    return "\n".join(lines) + "\n"


def save_config(config: Config, path: str | Path) -> None:
    """`to_yaml` into a file, which appears complete or not at all.  One rank calls it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(to_yaml(config))
    os.replace(file.name, target)


def _entry(key: str, value: Any, indent: int, source: str | None) -> list[str]:
    # a list stays on the line of its key, where the comment can follow it
    options = {"allow_unicode": True, "width": 10**6, "sort_keys": False}
    if isinstance(value, (list, dict)):
        text = f"{yaml.safe_dump(key).split(chr(10))[0]}: {yaml.safe_dump(value, default_flow_style=True, **options)}"
    else:
        text = yaml.safe_dump({key: value}, **options)
    lines = [" " * indent + line for line in text.rstrip("\n").split("\n")]
    if source:
        lines[-1] = f"{lines[-1]:<44}  # {source}"
    return lines


def read_file(path: Path) -> Layer:
    """The values of a YAML file, with the line of each key.  ConfigError when there is none, or it is no YAML."""
    try:
        text = path.read_text("utf-8")
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: got {error.strerror}, expected a YAML file; those to start from are in configs/",
                          where=str(path)) from error  # fmt: skip
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"got text that is no YAML ({_yaml_problem(error)}), expected 'key: value' lines",
                          where=_place(path, error)) from error  # fmt: skip
    if not isinstance(loaded, DictConfig):
        raise ConfigError("got a YAML list or a single value, expected 'key: value' lines", where=str(path))
    return Layer(OmegaConf.to_container(loaded, resolve=False), str(path), lines)


def _read_override(text: str) -> Layer:
    key, equals, _ = text.partition("=")
    if not equals or not key or key != key.strip(" -+~"):
        raise ConfigError(f"got the override {text!r}, expected key=value without dashes, such as train.steps=20", where=COMMAND_LINE)
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"got the override {text!r} ({_yaml_problem(error)}), expected key=value with a YAML value; does it need quotes?",
                          where=COMMAND_LINE) from error  # fmt: skip
    return Layer(values, COMMAND_LINE, {})


def _recipe(layer: Layer) -> list[Layer]:
    """What the recipe that `layer` names stands for, as a layer of its own below it."""
    name = layer.values.get("recipe")
    if name is None or name == "":
        return []
    if not isinstance(name, str) or name not in RECIPES:
        near = difflib.get_close_matches(str(name).lower(), RECIPES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(RECIPES)}"
        raise ConfigError(f"got the recipe {name!r}; {hint}", "recipe", layer.where("recipe"))
    values: dict[str, Any] = {}
    for key, value in RECIPES[name].items():
        section, _, inner = key.partition(".")
        values.setdefault(section, {})[inner] = value
    return [Layer(values, f"recipe {name} ({layer.where('recipe')})", {})]


def _yaml_problem(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).split("\n")[0]


def _place(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{path}:{mark.line + 1}" if mark else str(path)


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """{dotted key: line, from 1} of a parsed YAML text."""
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            found[dotted] = key.start_mark.line + 1
            found |= _lines(value, f"{dotted}.")
    return found


def _set_keys(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield from (f"{name}.{key}" for key in value) if isinstance(value, dict) else [name]


def _normalise(layer: Layer) -> None:
    """In place: what people write for "empty" and for "one file" in the form of the schema."""
    known, values = key_types(), layer.values
    for name, value in values.items():
        if value is None and name not in ("mu", "ramp", "rollout") and (is_dataclass(known[name]) or get_origin(known[name]) is dict):
            values[name] = {}
        for key in list(value) if isinstance(value, dict) else ():
            kind, inner = known.get(f"{name}.{key}"), value[key]
            if get_origin(kind) is list and (inner is None or isinstance(inner, str)):
                value[key] = [inner] if inner else []
            elif get_origin(kind) is list and any(isinstance(part, (dict, list)) for part in (inner if isinstance(inner, list) else [inner])):
                # OmegaConf would raise a bare TypeError, or take it
                raise ConfigError(f"got {inner!r}, expected {describe(kind)}", f"{name}.{key}", layer.where(f"{name}.{key}"))
            elif kind is str and inner is None:  # "data.tokenizer=" on the command line
                value[key] = ""
    if values.get("run_dir", "") is None:
        values["run_dir"] = ""


def _typed(merged: DictConfig, sources: dict[str, str]) -> Config:
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), merged)
        return replace(OmegaConf.to_object(typed), sources=sources)
    except OmegaConfBaseException as error:
        key = (getattr(error, "full_key", None) or "").split("[")[0]
        reason = str(error).split("\n")[0]
        if key in key_types() and not isinstance(error, InterpolationResolutionError):
            got = OmegaConf.select(merged, key)
            reason = f"got {got!r}, expected {describe(key_types()[key])}"
        raise ConfigError(reason, key or None, sources.get(key)) from error


def describe(kind: Any) -> str:
    """A type, in the words of an error message."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return "a path or a list of paths"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "keys below it")
