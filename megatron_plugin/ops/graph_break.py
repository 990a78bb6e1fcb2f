"""torch.compiler.disable has no types: behind it a function with eight arguments would be Any to a type checker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["graph_break"]

F = TypeVar("F", bound=Callable[..., Any])


def graph_break(fn: F) -> F:
    """`fn`, which torch.compile leaves as it is: its forward writes gradients, which a graph would have to know of."""
    return torch.compiler.disable(fn)
