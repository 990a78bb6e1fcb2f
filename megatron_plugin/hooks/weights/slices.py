"""Which rows or columns of which Hugging Face tensors make up one tensor-parallel rank's shard of a parameter.

r rank of T; d channels of a head; F hidden size of the MLP.

    rows      rank r has rows [r n, (r+1) n) of the padded vocabulary; rows beyond Hugging Face's are padding
    columns   rank r has columns [r n, (r+1) n)
    gate_up   rank r has rows [r F/T, (r+1) F/T) of gate, then the same of up: SwiGLU halves its own shard
    qkv       the whole matrix is, per query group, its query heads, its key head, its value head; rank r has rows [r n, (r+1) n) of that,
              also where there are fewer groups than ranks and the cut goes through a group (megatron-core's attention gathers them)
    whole     every rank has all of it
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_plugin.hooks.weights.errors import WeightsError
from megatron_plugin.hooks.weights.names import Dims, Rule

__all__ = ["Piece", "axis", "pieces", "shard_shape", "shards_of"]


@dataclass(frozen=True)
class Piece:
    """Indices [start, stop) along the split axis of tensor `part` lie at [at, at + stop - start) of the shard."""

    part: int
    start: int
    stop: int
    at: int

    def of_shard(self, shard: Tensor, rule: Rule) -> Tensor:
        return shard.narrow(axis(rule), self.at, self.stop - self.start)

    def of_whole(self, whole: Tensor, rule: Rule) -> Tensor:
        return whole.narrow(axis(rule), self.start, self.stop - self.start)


def axis(rule: Rule) -> int:
    """The axis along which the tensors are cut, of the Hugging Face tensor and of the shard alike."""
    return 1 if rule.split == "columns" else 0


def shards_of(rule: Rule, ranks: int) -> int:
    """How many different shards there are on `ranks` tensor-parallel ranks."""
    return 1 if rule.split == "whole" else ranks


def shard_shape(rule: Rule, shards: int, padded_vocab: int) -> tuple[int, ...]:
    """Shape of one shard.  WeightsError when the tensors cannot be cut evenly."""
    shape = list(rule.parts[0].shape)
    total = padded_vocab if rule.split == "rows" else sum(part.shape[axis(rule)] for part in rule.parts)
    if total % shards or (rule.split == "gate_up" and rule.parts[0].shape[0] % shards):
        raise WeightsError(f"{rule.parts[0].name}: got {total} along axis {axis(rule)}, expected a multiple of {shards} tensor-parallel ranks")
    shape[axis(rule)] = total // shards
    return tuple(shape)


def pieces(rule: Rule, dims: Dims, shard: int, shape: tuple[int, ...]) -> list[Piece]:
    """What shard number `shard`, of the given shape, is made of, in its own order.  Vocabulary padding is in no piece."""
    n = shape[axis(rule)]
    if rule.split == "gate_up":
        half = n // 2
        return [Piece(part, shard * half, (shard + 1) * half, part * half) for part in (0, 1)]
    if rule.split == "qkv":
        return _cut(_interleaved(dims), shard * n, (shard + 1) * n)
    return _cut([(0, 0, rule.parts[0].shape[axis(rule)])], shard * n, (shard + 1) * n)


def _interleaved(dims: Dims) -> list[tuple[int, int, int]]:
    """(part, start, stop) of linear_qkv's rows from top to bottom; parts 0, 1, 2 are q, k, v."""
    queries, d = dims.heads // dims.groups * dims.head_dim, dims.head_dim
    order = []
    for group in range(dims.groups):
        order += [(0, group * queries, (group + 1) * queries), (1, group * d, (group + 1) * d), (2, group * d, (group + 1) * d)]
    return order


def _cut(order: list[tuple[int, int, int]], start: int, stop: int) -> list[Piece]:
    """The part of the concatenation of `order` that lies in [start, stop)."""
    found, here = [], 0
    for part, first, last in order:
        low, high = max(start, here), min(stop, here + last - first)
        if low < high:
            found.append(Piece(part, first + low - here, first + high - here, low - start))
        here += last - first
    return found
