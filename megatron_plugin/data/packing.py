"""Samples -> rows of one fixed length, and the one place where labels are shifted.

Several samples share a row; each is a *segment*: it attends only to itself (block-diagonal causal mask), its positions start at 0, and its
last token has no label, so nothing is ever predicted across a boundary.  Packed and unpacked rows then give the same log-probability per
token.  (Rotary embeddings are relative, so with them the mask alone would do; learned positions need the reset.)

b: rows of a micro-batch, s: tokens per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from megatron_plugin.data.errors import BadLines, DataError
from megatron_plugin.data.order import BLANK_ROW
from megatron_plugin.data.tokenize import IGNORE_INDEX, Sample

__all__ = ["PAD_SEGMENT", "PackedBatch", "PackedRows", "PackingReport", "attention_mask", "cu_seqlens", "pack_samples", "plan_rows", "too_long", "truncate"]

PAD_SEGMENT = -1


@dataclass(frozen=True)
class PackedBatch:
    """What one micro-batch of the model and the loss needs.  Labels are already shifted: labels[t] is the token after tokens[t]."""

    tokens: Tensor
    """[b, s] int64."""
    labels: Tensor
    """[b, s] int64; -100 where nothing is predicted: untrained turns, the last token of each segment, padding."""
    loss_weight: Tensor
    """[b, s] fp32, the weight of the label at the same place; 0 where the label is -100."""
    position_ids: Tensor
    """[b, s] int64, from 0 in each segment."""
    segment_ids: Tensor
    """[b, s] int64, 0, 1, ... along a row; -1 on padding."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """[b, s] fp32 each, by name (Sample.columns): of the next token, like the label; 0 at the last token of a segment, on padding, and in samples
    without such a column."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with `fn` applied to every tensor (move, slice), the columns too."""
        tensors = {f.name: fn(getattr(self, f.name)) for f in fields(self) if f.name != "columns"}
        return PackedBatch(**tensors, columns={name: fn(values) for name, values in self.columns.items()})


@dataclass(frozen=True)
class PackingReport:
    """Nothing disappears without a number here."""

    samples: int
    rows: int
    tokens: int
    loss_tokens: int
    fill: float
    """Share of the rows' places that hold a token."""
    truncated: tuple[str, ...]
    """file:line of samples cut to the row's length."""
    dropped: tuple[str, ...]
    """file:line of samples left out: too long, or cut before their first trained token."""

    def __str__(self) -> str:
        return (
            f"{self.samples} samples in {self.rows} rows, {self.tokens} tokens ({self.fill:.1%} of the places), "
            f"{self.loss_tokens} with loss; {len(self.truncated)} truncated, {len(self.dropped)} dropped"
        )


@dataclass(frozen=True)
class PackedRows:
    """The data set as rows; tensors are made when a batch is asked for."""

    samples: tuple[Sample, ...]
    rows: tuple[tuple[int, ...], ...]
    """Indices into samples, one tuple a row."""
    seq_length: int
    pad_id: int
    report: PackingReport
    columns: tuple[str, ...] = ()
    """Names of the columns that every batch has."""

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> PackedBatch:
        """The given rows (BLANK_ROW: padding only), on the CPU."""
        b, s = len(rows), self.seq_length
        out = PackedBatch(
            tokens=torch.full((b, s), self.pad_id, dtype=torch.int64),
            labels=torch.full((b, s), IGNORE_INDEX, dtype=torch.int64),
            loss_weight=torch.zeros((b, s), dtype=torch.float32),
            position_ids=torch.zeros((b, s), dtype=torch.int64),
            segment_ids=torch.full((b, s), PAD_SEGMENT, dtype=torch.int64),
            columns={name: torch.zeros((b, s), dtype=torch.float32) for name in self.columns},
        )
        for place, row in enumerate(rows):
            start = 0
            for segment, index in enumerate(() if row == BLANK_ROW else self.rows[row]):
                sample = self.samples[index]
                stop = start + len(sample.tokens_T)
                out.tokens[place, start:stop] = sample.tokens_T
                # THE shift, the only one: place t gets label, weight and columns of token t + 1 of its own sample; the last keeps -100 and 0.
                out.labels[place, start : stop - 1] = sample.labels_T[1:]
                out.loss_weight[place, start : stop - 1] = sample.weight_T[1:]
                for name, values_T in sample.columns.items():
                    out.columns[name][place, start : stop - 1] = values_T[1:]
                out.position_ids[place, start:stop] = torch.arange(stop - start)
                out.segment_ids[place, start:stop] = segment
                start = stop
            out.position_ids[place, start:] = torch.arange(s - start)
        return out

    def unpacked(self, rows: Sequence[int], values_bs: Tensor) -> dict[int, Tensor]:
        """{index of a sample: its [T]} of values [b, s] in the places of the labels of batch(rows); each at its token's own place, the first 0.

        Undoes the shift of `batch`: a column that went in comes out, but for its first value, which no place has."""
        found = {}
        for place, row in enumerate(rows):
            start = 0
            for index in () if row == BLANK_ROW else self.rows[row]:
                stop = start + len(self.samples[index].tokens_T)
                found[index] = torch.cat((values_bs.new_zeros(1), values_bs[place, start : stop - 1]))
                start = stop
        return found

    def loss_tokens(self, row: int) -> int:
        """Tokens of a row that have a loss: a label, and a weight that is not 0."""
        return (
            0
            if row == BLANK_ROW
            else sum(
                int(((s.labels_T[1:] != IGNORE_INDEX) & (s.weight_T[1:] != 0)).sum()) for s in map(self.samples.__getitem__, self.rows[row])
            )
        )

    def sources(self, row: int) -> tuple[str, ...]:
        """file:line of each sample in a row, for messages about it."""
        return () if row == BLANK_ROW else tuple(self.samples[i].source for i in self.rows[row])

    def fingerprint(self) -> int:
        """A number of 56 bits that changes with any token, label, weight, column or row: a saved position is checked against it."""
        digest = hashlib.sha256(repr((self.seq_length, self.rows)).encode())
        for sample in self.samples:
            for tensor in (sample.tokens_T, sample.labels_T, sample.weight_T):
                digest.update(tensor.numpy().tobytes())
            for name in sorted(sample.columns):
                digest.update(name.encode() + sample.columns[name].numpy().tobytes())
        return int.from_bytes(digest.digest()[:7], "big")


def pack_samples(
    samples: Sequence[Sample],
    seq_length: int,
    *,
    pad_id: int,
    packing: bool = True,
    overlong: str = "error",
    bad_lines: BadLines | None = None,
) -> PackedRows:
    """Rows of `seq_length` tokens; with packing=False one sample a row.  Deterministic: no random numbers.

    `overlong`: what happens to a sample longer than a row: "error" (a bad line like any other), "truncate" (its end is cut off) or "drop".
    """
    if overlong not in ("error", "truncate", "drop"):
        raise ValueError(f"overlong: got {overlong!r}, expected 'error', 'truncate' or 'drop'")
    if seq_length < 2:
        raise ValueError(f"seq_length: got {seq_length}, expected at least 2 (a token and the one it predicts)")
    bad_lines = BadLines() if bad_lines is None else bad_lines
    kept, truncated, dropped = [], [], []
    for sample in samples:
        if len(sample.tokens_T) <= seq_length:
            kept.append(sample)
        elif overlong == "error":
            bad_lines.add(too_long(sample, seq_length))
        else:
            cut = truncate(sample, seq_length) if overlong == "truncate" else None
            if cut is None:
                dropped.append(sample.source)
            else:
                truncated.append(sample.source)
                kept.append(cut)
    bad_lines.check()
    if not kept:
        raise DataError(
            f"no sample is left (got {len(samples)}, {len(dropped)} dropped as longer than {seq_length} tokens): raise data.seq_length"
        )
    lengths = [len(sample.tokens_T) for sample in kept]
    rows = plan_rows(lengths, seq_length) if packing else [[i] for i in range(len(kept))]
    report = PackingReport(
        samples=len(kept),
        rows=len(rows),
        tokens=sum(lengths),
        loss_tokens=sum(int((k.labels_T[1:] != IGNORE_INDEX).sum()) for k in kept),
        fill=sum(lengths) / (len(rows) * seq_length),
        truncated=tuple(truncated),
        dropped=tuple(dropped),
    )
    columns = tuple(sorted({name for sample in kept for name in sample.columns}))
    return PackedRows(tuple(kept), tuple(map(tuple, rows)), seq_length, pad_id, report, columns)


def too_long(sample: Sample, seq_length: int) -> DataError:
    """Why a sample does not fit a row."""
    reason = f"too long (got {len(sample.tokens_T)} tokens, expected at most {seq_length})"
    return DataError(f"{reason}: raise data.seq_length, or set data.overlong to truncate or drop", sample.source)


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each length, longest first, goes where it leaves the least room.  Rows of indices, both in ascending order."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # [r]: the rows that have r places left
    rooms = 0  # bit r is set when with_room[r] is not empty: the best fit is one shift and one lowest set bit, also for 10^6 samples
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return sorted(sorted(row) for row in rows)


def attention_mask(segment_ids_bs: Tensor) -> Tensor:
    """[b, 1, s, s] bool in megatron-core's sense, True = masked out: everything but earlier places of the same segment.

    Padding attends to padding: a row of the mask that is all True would make the softmax 0/0.
    """
    s = segment_ids_bs.shape[1]
    same_bss = segment_ids_bs[:, :, None] == segment_ids_bs[:, None, :]
    causal_ss = torch.ones((s, s), dtype=torch.bool, device=segment_ids_bs.device).tril()
    return ~(same_bss & causal_ss)[:, None]


def cu_seqlens(segment_ids_bs: Tensor) -> Tensor:
    """Boundaries of all segments of the batch laid end to end, int32 [segments + 1], for variable-length attention; padding counts too."""
    b, s = segment_ids_bs.shape
    starts_bs = torch.ones((b, s), dtype=torch.bool, device=segment_ids_bs.device)  # each row starts a segment
    starts_bs[:, 1:] = segment_ids_bs[:, 1:] != segment_ids_bs[:, :-1]
    starts = starts_bs.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([b * s])]).to(torch.int32)


def truncate(sample: Sample, seq_length: int) -> Sample | None:
    """The first seq_length tokens; None when no trained token is left among them."""
    columns = {name: values[:seq_length] for name, values in sample.columns.items()}
    cut = Sample(sample.tokens_T[:seq_length], sample.labels_T[:seq_length], sample.weight_T[:seq_length], sample.source, columns)
    return cut if (cut.labels_T[1:] != IGNORE_INDEX).any() else None
