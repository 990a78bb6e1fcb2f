"""Taking the arithmetic of a peer out of its source where the package around it cannot be imported.

Nothing is rewritten: the named functions, classes or statements are cut out of the file by its syntax tree, and what is executed is the
peer's own text, in a namespace that holds the libraries it computes with.  A name that is missing there is a NameError, not a guess.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["functions", "method", "statements"]

# annotations are text, as under `from __future__ import annotations`: the types of the rest of the package are not needed
HEAD = "from __future__ import annotations\n"


def functions(path: Path, *names: str, **known: Any) -> SimpleNamespace:
    """Top-level functions, classes and constants of a file, executed in the order of the file; `known`: other names they use."""
    tree = ast.parse(path.read_text())
    found = [node for node in tree.body if _name(node) in names]
    assert sorted(map(_name, found)) == sorted(names), f"{path} has {sorted(map(_name, found))}, expected {sorted(names)}"
    return _run("\n".join(ast.unparse(node) for node in found), path, known)


def method(path: Path, owner: str, *names: str, **known: Any) -> SimpleNamespace:
    """Methods of a class as plain functions of (self, ...), without their decorators."""
    tree = ast.parse(path.read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)
    found = [node for node in body if _name(node) in names]
    assert len(found) == len(names), f"{path}: {owner} has {[_name(node) for node in found]}, expected {names}"
    for node in found:
        node.decorator_list = []
    return _run("\n".join(ast.unparse(node) for node in found), path, known)


def statements(function: Callable, chosen: Callable[[ast.stmt], bool]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The one statement (with all in it) of `function` that `chosen` picks, as a function from the names it reads to all names after it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and chosen(node)]
    assert len(found) == 1, f"{function.__qualname__}: {len(found)} statements fit, expected one"
    code = compile(ast.Module(found, []), inspect.getfile(function), "exec")
    module: ModuleType = inspect.getmodule(function)

    def run(names: dict[str, Any]) -> dict[str, Any]:
        space = dict(vars(module)) | names
        exec(code, space)
        return space

    return run


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", None)
    return getattr(node, "name", None)


def _run(text: str, path: Path, known: dict[str, Any]) -> SimpleNamespace:
    space = {"torch": torch, "F": F, "math": math, **known}
    exec(compile(HEAD + text, str(path), "exec"), space)
    return SimpleNamespace(**space)
