"""Which losses there are and what parameters each has, read from the source text of megatron_plugin/losses.

Importing the losses costs seconds, because it imports torch; a mistyped name is refused at once.  Where they have been imported already they are
asked themselves, because a program may have added its own to LOSSES.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.schema import Config

__all__ = ["check_loss_fields", "loss_fields", "regularisers"]

LOSSES = Path(__file__).parents[1] / "losses"


def check_loss_fields(config: Config) -> Iterator[ConfigError]:
    """What `bind` would refuse of loss.name and the keys beside it.  A function of the user's, by its dotted path, is not looked at."""
    name, known = config.loss.get("name"), loss_fields()
    if not isinstance(name, str) or not name or "." in name:
        return
    if name not in known:
        reason = f"got {name!r}{_nearest(name, known)}, expected one of {', '.join(sorted(known))}, or a function of yours as package.module.function"
        yield ConfigError(reason, "loss.name", config.sources.get("loss.name", "default"))
        return
    takes = (*known[name], *regularisers())
    for key in config.loss:
        if key != "name" and key not in takes and "**" not in takes:
            reason = f"got a parameter that loss {name} has not{_nearest(key, takes)}, expected one of {', '.join(takes)}"
            yield ConfigError(reason, f"loss.{key}", config.sources.get(f"loss.{key}", "default"))
    if config.ramp is not None and "ramp" not in takes:
        where = next((origin for key, origin in config.sources.items() if key.startswith("ramp.")), None)
        yield ConfigError(f"got a schedule, expected none: loss {name} has no parameter ramp; leave the section out, or use loss.name=idft", "ramp", where)


def loss_fields() -> dict[str, tuple[str, ...]]:
    """{name: names of its parameters, "**" for any} of every loss in LOSSES."""
    loaded = getattr(sys.modules.get("megatron_plugin.losses"), "LOSSES", None)
    return _written() if loaded is None else {name: _parameters(loss.fn) for name, loss in loaded.items()}


def _parameters(function) -> tuple[str, ...]:
    try:
        found = list(inspect.signature(function).parameters.values())[2:]
    except ValueError:  # bind says it better
        return ("**",)
    return tuple("**" if parameter.kind is parameter.VAR_KEYWORD else parameter.name for parameter in found)


@functools.cache
def _written() -> dict[str, tuple[str, ...]]:
    table = next(node.value for node in _tree("__init__").body if isinstance(node, ast.AnnAssign) and node.target.id == "LOSSES")
    found = {}
    for key, value in zip(table.keys, table.values, strict=True):
        function = value.args[0]  # _loss(dft.dft, ...): the function dft of dft.py
        definition = next(node for node in _tree(function.value.id).body if isinstance(node, ast.FunctionDef) and node.name == function.attr)
        found[key.value] = tuple(a.arg for a in (*definition.args.args[2:], *definition.args.kwonlyargs))
        if any("with_rollout_options" in ast.dump(decorator) for decorator in definition.decorator_list):
            found[key.value] += tuple(ast.literal_eval(_assigned("rollout_options", "OPTIONS")))
    return found


@functools.cache
def regularisers() -> tuple[str, ...]:
    """Names of the coefficients that every loss takes."""
    return tuple(key.value for key in _assigned("regularisers", "REGULARISERS").keys)


def _assigned(module: str, name: str) -> ast.expr:
    return next(node.value for node in _tree(module).body if isinstance(node, ast.Assign) and node.targets[0].id == name)


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse((LOSSES / f"{module}.py").read_text("utf-8"))


def _nearest(got: str, valid) -> str:
    near = difflib.get_close_matches(got.lower(), valid, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
