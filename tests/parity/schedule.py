"""mu over the steps: the same question to both that have it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_plugin import mu_schedule
from megatron_plugin.schedules.mu import MU_PRESETS
from tests.parity.cell import Cell
from tests.parity.ours import Answer

PRESETS = ("mu", "phi", "shipped", "trinity")


def mu_cells(theirs: str, peer: Callable[..., float]) -> list[Cell]:
    """Every step of each preset, and 50 beyond its end."""
    return [Cell(f"{theirs}, {name}", f'mu_schedule(step, **MU_PRESETS["{name}"])', lambda own: _theirs(peer, own), _ours, preset=name,
                 inputs=(name,), make=lambda name, dtype: MU_PRESETS[name], said="every step", dtypes=(torch.float64,)) for name in PRESETS]  # fmt: skip


def _steps(own: dict) -> range:
    return range(own["warmup_steps"] + own["decay_steps"] + 50)


def _ours(own: dict) -> Answer:
    return Answer(torch.tensor([mu_schedule(step, **own) for step in _steps(own)], dtype=torch.float64))


def _theirs(peer: Callable[..., float], own: dict) -> Answer:
    found = [peer(step, own["warmup_steps"], own["decay_steps"], own["peak"], own["valley"]) for step in _steps(own)]
    return Answer(torch.tensor(found, dtype=torch.float64))
