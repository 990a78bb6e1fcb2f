"""From shards on many ranks to whole Hugging Face tensors, one at a time, in the order of the layers.

Every rank first tells the others which shards it holds, so any pipeline, virtual, expert or uneven layout is alike.  Then each shard goes
from the first rank that holds it to all ranks (broadcast) or to one (send), into its place in the tensor.  In flight: the tensors of one
parameter (q, k and v, or gate and up) and one shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.hooks.weights.errors import WeightsError
from megatron_plugin.hooks.weights.model import Parameter
from megatron_plugin.hooks.weights.names import Dims, expected_tensors, rule_of
from megatron_plugin.hooks.weights.slices import pieces

__all__ = ["Source", "assemble", "on_any_rank", "sources", "together"]

T = TypeVar("T")
ALL = "expected every rank to take part with all its chunks"


@dataclass(frozen=True)
class Source:
    """A parameter of the whole model and the ranks that hold it."""

    name: str
    holders: tuple[int, ...]
    """Global rank of each shard's holder."""
    shape: tuple[int, ...]
    """Of one shard."""
    dtype: torch.dtype


def together(check: Callable[[], T]) -> T:
    """What `check` returns; if it raises WeightsError or OSError on any rank, a WeightsError on every rank, so that none is left waiting."""
    result: Any = None
    failure: str | None = None
    try:
        result = check()
    except (WeightsError, OSError) as error:
        failure = str(error)
    said = [failure] * dist.get_world_size()
    dist.all_gather_object(said, failure)
    if first := next((text for text in said if text), None):
        raise WeightsError(first)
    return result


def on_any_rank(flag: bool) -> bool:
    said = [flag] * dist.get_world_size()
    dist.all_gather_object(said, flag)
    return any(said)


def sources(mine: list[Parameter], dims: Dims) -> list[Source]:
    """Every parameter that whole tensors are made from, in the order of the Hugging Face names.  WeightsError when tensors would be missing."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, [(p.name, p.shard, p.shards, tuple(p.tensor.shape), p.tensor.dtype) for p in mine if p.is_first_replica])
    holders: dict[str, dict[int, int]] = {}
    about: dict[str, tuple] = {}
    for rank, report in enumerate(said):
        for name, shard, *rest in report:
            about.setdefault(name, tuple(rest))
            holders.setdefault(name, {}).setdefault(shard, rank)
    place = {name: i for i, name in enumerate(expected_tensors(dims))}
    made: dict[int, Source] = {}
    # the embedding sorts before the tied copy of it on the last stage: "e" < "o"
    for name in sorted(holders):
        shards, shape, dtype = about[name]
        if len(holders[name]) != shards:
            raise WeightsError(f"{name}: got shards {sorted(holders[name])} of {shards}; {ALL}")
        source = Source(name, tuple(holders[name][i] for i in range(shards)), shape, dtype)
        made.setdefault(place[rule_of(name, dims).parts[0].name], source)
    covered = {part.name for source in made.values() for part in rule_of(source.name, dims).parts}
    if missing := [name for name in place if name not in covered]:
        raise WeightsError(f"got no parameter for {missing[0]} and {len(missing) - 1} more on any rank; {ALL}")
    return [made[i] for i in sorted(made)]


def assemble(order: list[Source], mine: dict[str, Tensor], dims: Dims, *, to: int | None, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) on rank `to`, or on every rank; on the others nothing, but they must exhaust the iterator too."""
    rank = dist.get_rank()
    for source in order:
        rule = rule_of(source.name, dims)
        receives = to is None or to == rank
        whole = [torch.empty(part.shape, dtype=source.dtype, device=device) for part in rule.parts] if receives else []
        for number, holder in enumerate(source.holders):
            shard = _move(source, mine[source.name].detach() if holder == rank else None, holder, to, device)
            for piece in pieces(rule, dims, number, source.shape) if receives else ():
                assert shard is not None
                piece.of_whole(whole[piece.part], rule).copy_(piece.of_shard(shard, rule))
        shard = None
        for part in rule.parts if receives else ():
            yield part.name, whole.pop(0)  # not kept: the next parameter's tensors must not come beside these


def _move(source: Source, own: Tensor | None, holder: int, to: int | None, device: torch.device) -> Tensor | None:
    """The shard, on the ranks that receive it."""
    rank = dist.get_rank()
    if to == holder or dist.get_world_size() == 1:
        return own
    if to is None:
        shard = own.contiguous() if own is not None else torch.empty(source.shape, dtype=source.dtype, device=device)
        dist.broadcast(shard, src=holder)
        return shard
    if rank == holder:
        assert own is not None
        dist.send(own.contiguous(), dst=to)
    elif rank == to:
        shard = torch.empty(source.shape, dtype=source.dtype, device=device)
        dist.recv(shard, src=holder)
        return shard
    return None
