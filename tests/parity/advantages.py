"""Advantages of a group: what all peers are asked, whatever the shape they take rewards in.  P prompts, n answers of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_plugin.losses.advantages import group_advantages
from tests.parity.case import REWARDS
from tests.parity.cell import Cell
from tests.parity.ours import Answer

Peer = Callable[[Tensor], Tensor]
"""Rewards [P, n] -> advantages [P, n]."""


def make_rewards(name: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor(REWARDS[name], dtype=dtype)


def mine(rewards: Tensor, **options) -> Answer:
    return Answer(group_advantages(rewards, **options))


def as_equals(rewards: Tensor, **options) -> Answer:
    """Each group of one as a group of two equal answers, whose advantages are 0."""
    return Answer(group_advantages(rewards.expand(-1, 2), **options)[:, :1])


def in_fp32(rewards: Tensor, eps: float, one_by_one: bool) -> Answer:
    """(R - mean) / (std + eps), group_advantages's formula in fp32 and without its rule that equal rewards give exactly 0.

    one_by_one: a group is a vector of its own, which torch adds up in another order than a row of a matrix."""
    if one_by_one:
        return Answer(torch.stack([(group - group.mean()) / (group.std() + eps) for group in rewards]))
    return Answer((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps))


def group_cells(theirs: str, peers: dict[str, Peer], *, eps: float, one_keeps: bool) -> list[Cell]:
    """Cells for each scale of `peers`.  one_keeps: a group of one keeps its reward, as ours."""
    cells = []
    for scale, peer in peers.items():
        options = {"scale": scale, "eps": eps}
        common = dict(peer=lambda r, peer=peer: Answer(peer(r.clone())), make=make_rewards)
        name, call = f"{theirs}, {scale}", f'group_advantages(scale="{scale}", eps={eps:g})'
        cells.append(Cell(name, call, mine=partial(mine, **options), inputs=("mixed", "equal"), said="3 groups of 4, equal ones too", **common))
        if scale == "group":
            cells.append(Cell(name, call, mine=partial(mine, **options), inputs=("sevens",), said="12 rewards of 0.7", dtypes=(torch.float32,),
                              why="the fp32 mean of equal rewards is a rounding off, and that is divided by eps; ours is exactly 0",
                              switched=partial(in_fp32, eps=eps, one_by_one=one_keeps), how="the same formula in fp32, written out in the test", **common))  # fmt: skip
        one = dict(mine=partial(mine, **options), inputs=("one",), said="groups of one", **common)
        if one_keeps:
            cells.append(Cell(name, call, **one))
        else:
            cells.append(Cell(name, call, why="the mean of a group of one is its own reward, so 0; ours keeps R, as verl and Trinity do",
                              switched=partial(as_equals, **options), how="two equal answers in place of one", **one))  # fmt: skip
    return cells
