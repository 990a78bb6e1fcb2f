"""Which keys `model` takes: the fields of megatron-core's TransformerConfig, read from its source text.

Importing megatron-core costs 5 s and pulls torch in; parsing two of its files costs 0.1 s, and a mistyped key is refused at once.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_plugin.config.aliases import ALIASES, HINTS
from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.schema import GPTArguments

__all__ = ["CHOICES", "OURS", "RESERVED", "accepts", "model_fields", "settable"]

FILES = ("model_parallel_config.py", "transformer/transformer_config.py")

OURS = {name: alias.key for name, alias in ALIASES.items() if alias.key.rpartition(".")[2] != name} | HINTS
"""Megatron's name, field or command-line flag -> our key: what `model` does not take."""
RESERVED = {  # fields that no key sets, and why
    "calculate_per_token_loss": "it is always true: every loss token of a step weighs the same",
    "use_cpu_initialization": "the trainer sets it from the device",
    "batch_p2p_sync": "the trainer sets it from the device",
    "variable_seq_lengths": "rows all have data.seq_length tokens",
    "mtp_num_layers": "multi-token prediction has no loss here yet",
    "expert_model_parallel_size": "experts are not spread over ranks yet",
    "expert_tensor_parallel_size": "experts are not spread over ranks yet",
    "hybrid_context_parallel": "only plain context parallelism is set up",
    "hierarchical_context_parallel_sizes": "only plain context parallelism is set up",
}
CHOICES = {"activation_func": ("gelu", "silu", "relu")}  # Python objects given by name: trainer/model.py looks them up

PLAIN = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "List": list, "tuple": list, "Tuple": list,
         "Sequence": list, "dict": dict, "Dict": dict, "Any": object}  # fmt: skip


@functools.lru_cache(maxsize=1)
def model_fields() -> dict[str, ast.expr]:
    """{name: annotation} of every key that `model` may have: TransformerConfig with its base classes, then GPTArguments.

    ConfigError when megatron-core is not installed, or is laid out in another way than 0.14 to 0.19."""
    folder = _megatron_core()
    try:
        nodes = [node for file in FILES for node in ast.parse((folder / file).read_text("utf-8")).body]
        classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        found = _fields_of("TransformerConfig", classes)
    except (OSError, SyntaxError, KeyError) as error:
        raise ConfigError(
            f"cannot read TransformerConfig's fields in {folder} (got {error!r}), expected megatron-core >=0.14,<0.20"
        ) from error
    return found | {f.name: ast.parse(f.type, mode="eval").body for f in fields(GPTArguments)}


def _megatron_core() -> Path:
    try:
        # Imports the parent `megatron` only, a namespace package without code (0.1 ms).
        spec = importlib.util.find_spec("megatron.core")
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("got no package megatron.core, expected megatron-core >=0.14,<0.20: pip install 'megatron-core>=0.14,<0.20' psutil")
    return Path(next(iter(spec.submodule_search_locations)))


def _fields_of(name: str, classes: dict[str, ast.ClassDef]) -> dict[str, ast.expr]:
    node, found = classes[name], {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= _fields_of(base.id, classes)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            found[item.target.id] = item.annotation
    return found


def accepts(annotation: ast.expr, value: Any) -> bool:
    """Whether a plain value (number, bool, string, list, None) can be what the annotation says.  Unknown types accept nothing."""
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):
            return accepts(ast.parse(text, mode="eval").body, value)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return accepts(left, value) or accepts(right, value)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return value is None or accepts(inner, value)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            return any(accepts(member, value) for member in members)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return any(isinstance(m, ast.Constant) and type(m.value) is type(value) and m.value == value for m in members)
        case ast.Subscript(value=ast.Name(id=container)):
            return container in PLAIN and isinstance(value, PLAIN[container])
        case ast.Name(id=name):
            # True is an int to Python, but `num_layers: true` is a mistake.
            return name in PLAIN and isinstance(value, PLAIN[name]) and (name in ("bool", "Any") or not isinstance(value, bool))
    return False


def settable(annotation: ast.expr) -> bool:
    """False for what no YAML value can be: functions, dtypes, context managers."""
    return any(accepts(annotation, value) for value in (1, 1.5, True, "", [], {})) or "Literal" in ast.dump(annotation)
