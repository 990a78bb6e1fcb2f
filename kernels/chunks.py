"""Which tokens pass the output head together.  Decided on the host alone: nothing here waits for a device.

T tokens in R slices of S (sequence parallelism; otherwise R = 1, S = T): token r * S + s belongs to row s of rank r's hidden states.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MIB = 2**20
# (bytes, tokens, chunks): as many tokens as fit the bytes, no fewer than the tokens, and so many chunks at least.  CUDA: every chunk reads and
# writes dW once, which below 2048 tokens costs more than half of its GEMM and at 4096 still 3 % of the three.  CPU: of the GEMMs' speed 70 % is
# left at 256 tokens, 87 % at 512 and all of it at 1024; a third
# chunk costs half precision a remainder of dW (weight_grad.py); one chunk would save nothing.  Measured: benchmarks/NOTES.md
WORKSPACE = {"cuda": (1024 * MIB, 2048, 1), "cpu": (128 * MIB, 256, 2)}
ROUND = 128  # tokens: GEMM tiles


@dataclass(frozen=True)
class Chunk:
    """Tokens that pass the head together."""

    rows: slice | Tensor
    """Rows of this rank's hidden states: the same on every rank, and what is gathered."""
    tokens: slice | Tensor
    """Places of the tokens among the labels, in the order of the gathered rows."""
    kept: Tensor | None
    """Which of the gathered rows these tokens are; None: all of them."""
    size: int
    """Tokens."""
    gathered: int
    """Rows of all ranks together; `size` unless some are not kept."""


def chunk_size(tokens: int, row_bytes: int, device: str) -> int:
    """Tokens per chunk for a workspace of `row_bytes` per token: within the device's budget, chunks of equal size."""
    budget, least, fewest = WORKSPACE.get(device, WORKSPACE["cuda"])
    most = max(least, budget // row_bytes // ROUND * ROUND)
    chunks = max(-(-tokens // most), min(fewest, -(-tokens // least)), 1)
    return max(-(-tokens // chunks // ROUND), 1) * ROUND


def plan_chunks(tokens: int, slices: int, chunk_tokens: int, *, kept: Tensor | None, device: torch.device) -> list[Chunk]:
    """Chunks of at most `chunk_tokens` tokens (at least one row of every slice) that hold all tokens, or those of `kept`.

    kept: [L] int64 on the host, ascending places among the labels; its share of every chunk is sent to `device` in one copy.
    """
    if kept is None:
        step, S = max(1, chunk_tokens // slices), tokens // slices
        return [_run_of_rows(begin, min(begin + step, S), slices, S, device) for begin in range(0, S, step)]
    if slices == 1:
        parts = [(places, places, None, len(places)) for places in kept.split(chunk_tokens)] if len(kept) else []
    else:
        parts = list(_rows_with_tokens(kept, slices, tokens // slices, chunk_tokens))
    return _sent(parts, device)


def _run_of_rows(begin: int, end: int, slices: int, S: int, device: torch.device) -> Chunk:
    tokens = slice(begin, end)
    if slices > 1:
        starts_R1 = S * torch.arange(slices, device=device)[:, None]
        tokens = (starts_R1 + torch.arange(begin, end, device=device)).view(-1)
    return Chunk(slice(begin, end), tokens, None, slices * (end - begin), slices * (end - begin))


_Part = tuple[Tensor, Tensor, Tensor | None, int]


def _rows_with_tokens(kept: Tensor, slices: int, S: int, chunk_tokens: int) -> Iterator[_Part]:
    """(rows, places, kept, gathered) of each chunk: greedy over the rows that hold a kept token in any slice.

    Gathered rows are bounded too, by twice the chunk: where few slices keep a row, the others travel along in vain.
    """
    held_RS = torch.zeros(slices, S, dtype=torch.bool)
    held_RS.view(-1)[kept] = True
    rows = held_RS.any(0).nonzero().view(-1)
    total = held_RS.sum(0)[rows].cumsum(0)
    widest = max(1, 2 * chunk_tokens // slices)
    begin, before = 0, 0
    while begin < len(rows):
        fits = int(torch.searchsorted(total, before + chunk_tokens, right=True))
        end = min(max(fits, begin + 1), begin + widest)
        part = rows[begin:end]
        held = held_RS[:, part].reshape(-1)
        places = (S * torch.arange(slices)[:, None] + part).view(-1)[held]
        yield part, places, None if held.all() else held.nonzero().view(-1), slices * len(part)
        begin, before = end, int(total[end - 1])


def _sent(parts: list[_Part], device: torch.device) -> list[Chunk]:
    """The chunks with their index tensors on the device; runs of neighbours become slices."""
    found = [(_as_slice(rows), _as_slice(places), kept, len(places), gathered) for rows, places, kept, gathered in parts]
    indices = [x for chunk in found for x in chunk[:3] if isinstance(x, Tensor)]
    if indices and device.type != "cpu":
        sent = iter(torch.cat(indices).pin_memory().to(device, non_blocking=True).split([len(x) for x in indices]))
        found = [(*(next(sent) if isinstance(x, Tensor) else x for x in chunk[:3]), *chunk[3:]) for chunk in found]
    return [Chunk(*chunk) for chunk in found]


def _as_slice(places: Tensor) -> slice | Tensor:
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places
