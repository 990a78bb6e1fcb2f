"""Ids of samples over an epoch that is interrupted at a seeded step and goes on with as many data-parallel ranks, or half of them."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import torch

from megatron_plugin.data import RowOrder, Sample, pack_samples, shard
from tests.faults.promises import Case

PROMISE = "a resumed run sees the samples of the undisturbed one in their order; from 4 data-parallel ranks to 2, none of 10,000 ids twice and none missing"
IDS, SEQ = 10_000, 64


def cases(*, full: bool) -> list[Case]:
    tries = 5 if full else 1
    return [
        Case(f"{mode}, {before} ranks to {after}", partial(epoch, packed=packed, before=before, after=after, tries=tries), tries)
        for mode, packed in (("packed rows of experts", True), ("prompts, one a place", False))
        for before, after in (((4, 4), (4, 2)) if full else ((4, 2),))
    ]  # fmt: skip


def epoch(folder: Path, *, packed: bool, before: int, after: int, tries: int) -> None:
    rows, ids_of = _rows(packed)
    for seed in range(tries):
        batch, micro = 16, 2
        steps = -(-rows // batch)
        stop = random.Random(f"position {seed}").randrange(1, steps)
        whole = _ids(RowOrder(rows, batch, seed, fingerprint=7), range(steps), before, micro, ids_of)
        order = RowOrder(rows, batch, seed, fingerprint=7)
        begun = _ids(order, range(stop), before, micro, ids_of)
        (folder / "state.json").write_text(json.dumps(order.state_dict()))
        resumed = RowOrder(rows, batch, seed, fingerprint=7)
        resumed.load_state_dict(json.loads((folder / "state.json").read_text()))
        ended = _ids(resumed, range(stop, steps), after, micro, ids_of)
        assert begun + ended == whole, (seed, stop)  # step by step, and within a step in the order of the rows
        epoch_rows = [row for step in begun + ended for row in step][:rows]  # the last step runs into the next epoch
        flat = [name for names in epoch_rows for name in names]
        assert len(flat) == IDS and set(flat) == set(range(IDS)), (seed, len(flat), len(set(flat)))


def _rows(packed: bool):
    """(number of rows, row -> ids of its samples)."""
    if not packed:
        return IDS, lambda row: [row]
    rng = random.Random("lengths")
    samples = []
    for i in range(IDS):
        length = rng.randrange(4, SEQ)
        samples.append(Sample(torch.arange(length), torch.arange(length), torch.ones(length), source=str(i)))
    rows = pack_samples(samples, SEQ, pad_id=0, packing=True)
    return len(rows), lambda row: [int(source) for source in rows.sources(row)]


def _ids(order: RowOrder, steps, ranks: int, micro: int, ids_of) -> list[list[list[int]]]:
    """The ids of each row of each step, those of rank 0 first."""
    seen = []
    for _ in steps:
        rows = order.next_step()
        own = [shard(rows, dp_rank=rank, dp_size=ranks, micro_batch=micro) for rank in range(ranks)]
        seen.append([ids_of(row) for parts in own for part in parts for row in part])
    return seen
