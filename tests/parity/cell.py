"""A cell of the table: one function of a peer beside ours, what is compared, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.parity.case import KINDS, make_case
from tests.parity.ours import Answer
from tests.tolerances import PARITY_FP32, PARITY_FP64

__all__ = ["Cell", "Outcome", "judge"]

BOUNDS = {torch.float32: PARITY_FP32, torch.float64: PARITY_FP64}
SHORT = {torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Cell:
    theirs: str
    """The function, as one finds it in the peer."""
    ours: str
    """Ours, as a user writes it."""
    peer: Callable[[Any], Answer]
    mine: Callable[[Any], Answer]
    why: str = ""
    """What deviates.  With it, `mine` must differ and `switched` must not: an explanation that explains nothing is a failure too."""
    switched: Callable[[Any], Answer] | None = None
    """Ours with that deviation switched on."""
    how: str = ""
    """How it is switched on, in our words."""
    preset: str = ""
    """The preset of ours that bears the source's name, where `mine` uses one."""
    inputs: tuple[Any, ...] = KINDS
    """Kinds of case.py, or whatever `make` turns into what both sides take."""
    make: Callable[[Any, torch.dtype], Any] = make_case
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    bound: float | None = None
    """Another bound, of half precision: the verdict is "within" and the note, not "agrees"."""
    said: str = ""
    """The inputs, for the table, where they are no kinds of case.py."""
    note: str = ""
    """What the reader of "agrees" has to know."""


@dataclass
class Outcome:
    """Largest differences over all inputs, relative: |ours - theirs| / max(1, |theirs|) of values, over the largest entry of gradients."""

    verdict: str
    ok: bool
    value: dict[str, float] = field(default_factory=dict)
    grad: dict[str, float | None] = field(default_factory=dict)
    apart: float = 0.0
    """Of an explained cell: how far apart the two are without the switch, fp32, the larger of value and gradient."""


def judge(cell: Cell) -> Outcome:
    """Agrees, is a preset, or is explained; otherwise the outcome is not ok and says what is wrong."""
    compared = cell.switched if cell.why else cell.mine
    value, grad, apart = {}, {}, 0.0
    for dtype in cell.dtypes:
        found = [_differences(cell, compared, item, dtype) for item in cell.inputs]
        value[SHORT[dtype]] = max(v for v, _ in found)
        grads = [g for _, g in found if g is not None]
        grad[SHORT[dtype]] = max(grads) if grads else None
        if cell.why and dtype is cell.dtypes[0]:
            apart = max(max(v, g or 0.0) for v, g in (_differences(cell, cell.mine, item, dtype) for item in cell.inputs))
    worst = {SHORT[d]: max(value[SHORT[d]], grad[SHORT[d]] or 0.0) for d in cell.dtypes}
    bounds = {SHORT[d]: cell.bound or BOUNDS[d] for d in cell.dtypes}
    beyond = [f"{name} {worst[name]:.1e} > {bound:.0e}" for name, bound in bounds.items() if not worst[name] <= bound]
    outcome = Outcome("", not beyond, value, grad, apart)
    if beyond:
        outcome.verdict = f"DIFFERS: {', '.join(beyond)}"
    elif cell.why and not apart > bounds[SHORT[cell.dtypes[0]]]:
        outcome.verdict, outcome.ok = f"said to differ ({cell.why}), but agrees within {apart:.0e}", False
    elif cell.why:
        outcome.verdict = f"explained: {cell.why} ({apart:.0e} apart); {cell.how}"
    elif cell.bound:
        outcome.verdict = f"within {cell.note}"
    else:
        outcome.verdict = (f"preset `{cell.preset}`" if cell.preset else "agrees") + (f"; {cell.note}" if cell.note else "")
    return outcome


def _differences(cell: Cell, ours: Callable, item: Any, dtype: torch.dtype) -> tuple[float, float | None]:
    made = cell.make(item, dtype)
    got, want = ours(made), cell.peer(made)
    assert got.value.shape == want.value.shape, f"{cell.theirs}: ours {list(got.value.shape)}, theirs {list(want.value.shape)}"
    assert (got.grad is None) == (want.grad is None), f"{cell.theirs}: one side has a gradient"
    truth = want.value.double()
    value = _largest((got.value.double() - truth) / truth.abs().clamp(min=1))
    if want.grad is None:
        return value, None
    size = _largest(want.grad.double())
    assert 1e-4 < size < math.inf, f"{cell.theirs}, {item}: a gradient of {size:.0e} proves nothing"
    return value, _largest(got.grad.double() - want.grad.double()) / size


def _largest(x: Tensor) -> float:
    """inf for NaN, which Python's max would lose."""
    found = float(x.abs().max())
    return math.inf if math.isnan(found) else found
