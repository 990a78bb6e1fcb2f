"""YAML file + dotted overrides -> Config, and back to YAML with the origin of every value."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from megatron_plugin.config.aliases import COMMAND_LINE, Layer, check_spellings, translated
from megatron_plugin.config.checks import check
from megatron_plugin.config.errors import ConfigError, raise_all
from megatron_plugin.config.keys import key_types, stays_text, wrong_keys
from megatron_plugin.config.recipes import RECIPES
from megatron_plugin.config.schema import Config
from megatron_plugin.config.smoke import SMOKE, smoke_values

__all__ = ["describe", "load_config", "read_file", "save_config", "to_yaml"]

MASK = "***"
SECRET = re.compile(r"(^|[_-])(token|key|apikey|password|passwd|secret|credentials?)$", re.IGNORECASE)
LOGIN = re.compile(r"(\w://)[^/\s@]+@")
REFERENCE = re.compile(r"\$\{[\w.]+\}")
"""To another key: ${train.lr}."""
LARGEST = 10_000
"""Values in a file.  Ten lines of aliases of aliases stand for 10^9, which would fill the memory."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None, smoke: bool = False) -> Config:
    """The checked configuration of a YAML file with overrides such as "parallel.tensor=2" applied in order.

    smoke: everything small (smoke.py), but for what the overrides say; the file is checked as it is first.

    `world_size`: ranks of the job, for the checks that need it; None: they are left out.  ConfigError names the key, its origin
    (file:line or command line), what was got and expected, and says everything that is wrong, a line each."""
    parts, wrong = _layers(Path(path), overrides)
    config, more = _built(parts, path)
    if smoke and not wrong and not more:
        try:
            check(config)
        except ConfigError:  # of the file itself, or only of overrides beside sizes that are about to go?
            load_config(path)
        parts.append(Layer(smoke_values(config, world_size or 1), SMOKE, {}))
        config, more = _built(parts, path)
    try:
        check(config, world_size, [*wrong, *more])
    except ConfigError as error:
        raise error if error.where else ConfigError(error.reason, error.key, str(path)) from None
    return config


def _layers(path: Path, overrides: Sequence[str]) -> tuple[list[Layer], list[ConfigError]]:
    """The file and every override, each behind the recipe it names, in our own names; and what is wrong with aliases."""
    read = [translated(layer, tuple(key_types())) for layer in (read_file(path), *map(_read_override, overrides))]
    own, wrong = [layer for layer, _ in read], [error for _, errors in read for error in errors]
    return [part for layer in own for part in (*_recipe(layer), layer)], [*wrong, *check_spellings(own[1:])]


def _built(layers: Sequence[Layer], path: str | Path) -> tuple[Config, list[ConfigError]]:
    """What the layers make over each other, unchecked, and what of them could not be used."""
    sources: dict[str, str] = {}
    wrong: list[ConfigError] = []
    for layer in layers:
        for error in (*wrong_keys(layer.values, layer.where), *_normalise(layer)):
            wrong.append(error)
            _drop(layer.values, error.key)  # so that what else is wrong is found too
        sources |= {key: layer.where(key) for key in _set_keys(layer.values)}
    config = _typed(OmegaConf.merge(*(OmegaConf.create(layer.values) for layer in layers)), sources, wrong)
    if not config.run_dir:
        config = replace(config, run_dir=f"runs/{Path(path).stem}", sources=sources | {"run_dir": "name of the config file"})
    return config, wrong


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that load_config reads back; values that are not defaults say in a comment where they come from.

    Texts that are secrets are masked: those of keys called token, key, password, secret or credential, and user:password@ in addresses."""
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


def _masked(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_masked(key, part) for part in value]
    if isinstance(value, dict):
        return {name: _masked(str(name), part) for name, part in value.items()}
    if not isinstance(value, str):
        return value
    return MASK if value and SECRET.search(key) else LOGIN.sub(rf"\1{MASK}@", value)


def _entry(key: str, value: Any, indent: int, source: str | None) -> list[str]:
    value = _masked(key, value)
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
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _size(node) > LARGEST:
            raise ConfigError(f"got a YAML file of more than {LARGEST} values, expected a configuration: are there aliases of aliases, or of what holds them?", where=str(path))
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        lines = _lines(node)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: got {error.strerror}, expected a YAML file; 'megatron-plugin config init' writes some to start from into configs/",
                          where=str(path)) from error  # fmt: skip
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"got text that is no YAML ({_yaml_problem(error)}), expected 'key: value' lines",
                          where=_place(path, error)) from error  # fmt: skip
    if not isinstance(loaded, DictConfig):
        raise ConfigError("got a YAML list or a single value, expected 'key: value' lines", where=str(path))
    return _plain(Layer(OmegaConf.to_container(loaded, resolve=False), str(path), lines))


def _read_override(text: str) -> Layer:
    key, equals, value = text.partition("=")
    if not equals or not key or key != key.strip(" -+~"):
        raise ConfigError(f"got the override {text!r}, expected key=value without dashes, such as train.steps=20", where=COMMAND_LINE)
    text = f"{key}='{value}'" if stays_text(key, value) else text
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"got the override {text!r} ({_yaml_problem(error)}), expected key=value with a YAML value; does it need quotes?",
                          where=COMMAND_LINE) from error  # fmt: skip
    return _plain(Layer(values, COMMAND_LINE, {}))


def _plain(layer: Layer) -> Layer:
    """The layer; ConfigError when a value asks OmegaConf to run one of its functions instead of naming another key."""
    for key, value in _texts(layer.values):
        if "${" in REFERENCE.sub("", value):
            raise ConfigError(f"got {value!r}, expected a plain value or another key, such as ${{train.lr}}: functions such as oc.env, which "
                              "could carry a secret of the environment into files and addresses, are not run", key, layer.where(key))  # fmt: skip
    return layer


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested values; a list's have the key of the list."""
    if isinstance(value, str):
        yield key, value
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _texts(inner, f"{key}.{name}" if key else str(name))
    for inner in value if isinstance(value, list) else ():
        yield from _texts(inner, key)


def _drop(values: dict[Any, Any], key: str) -> None:
    """Take a dotted key out, be it a section, below one, or one written with its dot."""
    for name in [name for name in values if str(name) == key]:
        del values[name]
    section, _, inner = key.partition(".")
    if isinstance(values.get(section), dict):
        for name in [name for name in values[section] if str(name) == inner]:
            del values[section][name]


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


def _size(node: yaml.Node | None) -> int:
    """How many values the text stands for, with every alias written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = LARGEST + 1  # until it is known: one that holds itself has no end
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(map(size, parts)))
        return sizes[id(node)]

    return 0 if node is None else size(node)


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """{dotted key: line, from 1} of a parsed YAML text."""
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            found |= {dotted: key.start_mark.line + 1} | _lines(value, f"{dotted}.")
    return found


def _set_keys(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield from (f"{name}.{key}" for key in value) if isinstance(value, dict) else [name]


def _normalise(layer: Layer) -> Iterator[ConfigError]:
    """In place: what people write for "empty" and for "one file" in the form of the schema; yields what has no such form."""
    known, values = key_types(), layer.values
    for name, value in values.items():
        if value is None and name not in ("mu", "ramp", "rollout") and (is_dataclass(known[name]) or get_origin(known[name]) is dict):
            values[name] = {}
        for key in list(value) if isinstance(value, dict) else ():
            kind, inner = known.get(f"{name}.{key}"), value[key]
            if get_origin(kind) is list and (inner is None or isinstance(inner, (str, int))):
                value[key] = [inner] if inner not in (None, "") else []
            elif get_origin(kind) is list and any(isinstance(part, (dict, list)) for part in (inner if isinstance(inner, list) else [inner])):
                # OmegaConf would raise a bare TypeError, or take it
                yield ConfigError(f"got {inner!r}, expected {describe(kind)}", f"{name}.{key}", layer.where(f"{name}.{key}"))
            elif kind is str and inner is None:  # "data.tokenizer=" on the command line
                value[key] = ""
    if values.get("run_dir", "") is None:
        values["run_dir"] = ""


def _typed(merged: DictConfig, sources: dict[str, str], wrong: list[ConfigError]) -> Config:
    """Of what has the right type; what has not goes to `wrong`."""
    while True:
        try:
            return replace(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), merged)), sources=sources)
        except OmegaConfBaseException as error:  # about one key at a time
            key = (getattr(error, "full_key", None) or "").split("[")[0]
            reason = str(error).split("\n")[0]
            if key in key_types() and not isinstance(error, InterpolationResolutionError):
                reason = f"got {_value(merged, key)!r}, expected {describe(key_types()[key])}"
            wrong.append(ConfigError(reason, key or None, sources.get(key)))
            left = OmegaConf.to_container(merged, resolve=False)
            before = len(list(_set_keys(left)))
            _drop(left, key)
            if len(list(_set_keys(left))) == before:  # whose key is not known: nothing more can be found
                raise_all(wrong)
            merged = OmegaConf.create(left)


def _value(merged: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(merged, key)
    except OmegaConfBaseException:
        return None


def describe(kind: Any) -> str:
    """A type, in the words of an error message."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return "a whole number or a list of them" if get_args(kind) == (int,) else "a path or a list of paths"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "keys below it")
