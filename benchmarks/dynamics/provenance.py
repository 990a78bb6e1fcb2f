"""Which code made a record: a hash of what decides an arm's numbers, and the commit and date at which it was run.

Hashed are syntax trees without docstrings (comments and layout do not count): the modules that all studies share, of a study's own module what its `run`
reaches, and the library's losses, statistics, schedules and mixing.  How results are judged, drawn and written is not in it.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import _machine

__all__ = ["code_of", "code_of_run", "made_now", "reached"]

SHARED = ("base", "columns", "learn", "mixed", "model")
LIBRARY = ("losses/*.py", "ops/*.py", "schedules/*.py", "rollout/hinted/mixing.py", "rollout/hinted/options.py")


@cache
def code_of(own: Path, start: str = "run", root: Path = _machine.ROOT) -> str:
    """12 hexadecimal digits for the function `start` of the file `own`, with what it needs of the tree at `root`."""
    shared = [root / "benchmarks" / "dynamics" / f"{name}.py" for name in SHARED]
    library = sorted(path for pattern in LIBRARY for path in (root / "megatron_plugin").glob(pattern))
    parts = [ast.dump(without_docstrings(ast.parse(path.read_text()))) for path in (*shared, *library)]
    return hashlib.sha256("\n".join([*parts, *reached(own.read_text(), start)]).encode()).hexdigest()[:12]


def reached(text: str, start: str) -> list[str]:
    """What `start` needs of its module's top level, itself first; imports are not followed."""
    named = {name: node for node in without_docstrings(ast.parse(text)).body for name in defined(node)}
    todo, found = [start], []
    while todo:
        node = named.pop(todo.pop(), None)
        if node is not None:
            found.append(ast.dump(node))
            todo += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return sorted(set(found))


def defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module's top level binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    for target in getattr(node, "targets", [getattr(node, "target", None)]):
        yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name)) if target is not None else ()


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))] or [ast.Pass()]
    return tree


def code_of_run(run: Callable) -> str:
    return code_of(Path(inspect.getsourcefile(run) or ""), run.__name__)


def made_now(run: Callable) -> dict[str, Any]:
    """Of a record that is being made: {"code", "commit", "dirty", "date"}; dirty: uncommitted changes, None where there is no repository."""
    head, dirty = _machine.commit()
    return {"code": code_of_run(run), "commit": head, "dirty": dirty, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M UTC}"}
