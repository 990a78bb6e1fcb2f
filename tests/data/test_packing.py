"""Rows: nothing lost, nothing across a boundary, nothing silent.   b: rows, s: tokens a row."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_plugin.data import BLANK_ROW, IGNORE_INDEX, PAD_SEGMENT, BadLines, DataError, Sample, attention_mask, cu_seqlens, pack_samples
from megatron_plugin.data.packing import plan_rows
from tests.data.samples import sample

PAD = 0


@st.composite
def sample_lists(draw) -> list[Sample]:
    """Samples of 2 to 12 tokens, each token different from all others, with random trained places (one at least behind the first)."""
    found, first = [], 1
    for number in range(draw(st.integers(1, 15))):
        length = draw(st.integers(2, 12))
        trained_T = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        trained_T[draw(st.integers(1, length - 1))] = True
        tokens_T = torch.arange(first, first + length)
        weight_T = trained_T * (0.5 + number)
        found.append(Sample(tokens_T, torch.where(trained_T, tokens_T, IGNORE_INDEX), weight_T.float(), f"x.jsonl:{number + 1}"))
        first += length
    return found


def expected_pairs(samples: list[Sample]) -> set:
    """(token, position, label, weight) as each sample alone would give them, written without any shift of tensors."""
    pairs = set()
    for one in samples:
        tokens, labels, weights = one.tokens_T.tolist(), one.labels_T.tolist(), one.weight_T.tolist()
        for t, token in enumerate(tokens):
            label, weight = (labels[t + 1], weights[t + 1]) if t + 1 < len(tokens) else (IGNORE_INDEX, 0.0)
            pairs.add((token, t, label, weight))
    return pairs


@settings(max_examples=80, deadline=None)
@given(samples=sample_lists(), packing=st.booleans(), seq_length=st.integers(12, 30))
def test_each_token_keeps_its_own_label_position_and_weight(samples, packing, seq_length):
    """The tokens are all different, so a label from another sample, a shift too much or a lost token cannot hide."""
    rows = pack_samples(samples, seq_length, pad_id=PAD, packing=packing)
    batch = rows.batch(range(len(rows)))
    real = batch.segment_ids != PAD_SEGMENT
    found = list(zip(*(x[real].tolist() for x in (batch.tokens, batch.position_ids, batch.labels, batch.loss_weight)), strict=True))
    assert set(found) == expected_pairs(samples) and len(found) == sum(len(one.tokens_T) for one in samples)
    assert (batch.tokens[~real] == PAD).all() and (batch.labels[~real] == IGNORE_INDEX).all() and (batch.loss_weight[~real] == 0).all()
    assert torch.equal(batch.loss_weight > 0, batch.labels != IGNORE_INDEX)
    assert rows.report.loss_tokens == int((batch.labels != IGNORE_INDEX).sum()) and rows.report.tokens == len(found)
    if not packing:
        assert len(rows) == len(samples) and [row for (row,) in rows.rows] == list(range(len(samples)))


@settings(max_examples=80, deadline=None)
@given(samples=sample_lists(), seq_length=st.integers(12, 30))
def test_no_label_crosses_a_boundary(samples, seq_length):
    rows = pack_samples(samples, seq_length, pad_id=PAD)
    batch = rows.batch(range(len(rows)))
    crosses = batch.segment_ids[:, :-1] != batch.segment_ids[:, 1:]
    assert (batch.labels[:, :-1][crosses] == IGNORE_INDEX).all() and (batch.labels[:, -1] == IGNORE_INDEX).all()
    has = batch.labels[:, :-1] != IGNORE_INDEX
    assert torch.equal(batch.labels[:, :-1][has], batch.tokens[:, 1:][has])


@settings(max_examples=80, deadline=None)
@given(samples=sample_lists(), seq_length=st.integers(12, 30))
def test_the_mask_and_the_boundaries(samples, seq_length):
    rows = pack_samples(samples, seq_length, pad_id=PAD)
    batch = rows.batch([*range(len(rows)), BLANK_ROW])
    mask = attention_mask(batch.segment_ids)
    b, s = batch.tokens.shape
    assert mask.shape == (b, 1, s, s) and mask.dtype == torch.bool and not mask.all(-1).any(), "a row that attends to nothing is 0/0"
    segments, edges = batch.segment_ids.tolist(), cu_seqlens(batch.segment_ids)
    for r in range(b):
        for q in range(s):
            for k in range(s):
                assert mask[r, 0, q, k].item() == (k > q or segments[r][q] != segments[r][k])
    starts = {r * s + t for r in range(b) for t in range(s) if t == 0 or segments[r][t] != segments[r][t - 1]}
    assert edges.dtype == torch.int32 and edges.tolist() == [*sorted(starts), b * s]
    assert (batch.position_ids.flatten()[edges[:-1].long()] == 0).all()


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_the_plan_is_a_partition_that_fits(lengths):
    rows = plan_rows(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows) and plan_rows(lengths, 20) == rows
    assert len(rows) <= 11 / 9 * max(1, -(-sum(lengths) // 20)) * 1.5 + 1, "best-fit decreasing is never this bad"


def test_the_plan_is_a_best_fit():
    """7 5 | 6 4 2 | rest: a first-fit or next-fit plan needs a third row, or fills otherwise."""
    assert plan_rows([4, 7, 2, 5, 6], 12) == [[0, 2, 4], [1, 3]]
    assert plan_rows([9, 8, 2], 10) == [[0], [1, 2]], "2 fits exactly behind 8 only"


def test_many_samples_are_planned_at_once_and_well():
    """A first-fit that looks at each open row would take minutes here and hours for a million."""
    lengths = torch.randint(16, 4096, (50_000,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = plan_rows(lengths, 4096)
    assert sum(lengths) / (len(rows) * 4096) > 0.98


def test_a_row_by_hand():
    two = [sample(3, first=10, trained_from=1, weight=2.0), sample(2, first=20, trained_from=1)]
    batch = pack_samples(two, 7, pad_id=PAD).batch([0])
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, PAD, PAD]]
    assert batch.labels.tolist() == [[11, 12, -100, 21, -100, -100, -100]]
    assert batch.loss_weight.tolist() == [[2.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, -1, -1]]
    assert cu_seqlens(batch.segment_ids).tolist() == [0, 3, 5, 7]
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_weight.dtype) == (torch.int64, torch.int64, torch.float32)


def test_a_blank_row():
    rows = pack_samples([sample(3)], 4, pad_id=PAD)
    batch = rows.batch([BLANK_ROW, 0])
    assert (
        (batch.labels[0] == IGNORE_INDEX).all()
        and (batch.segment_ids[0] == PAD_SEGMENT).all()
        and batch.position_ids[0].tolist() == [0, 1, 2, 3]
    )
    assert rows.sources(BLANK_ROW) == () and rows.sources(0) == ("x.jsonl:1",)
    assert batch.map(lambda x: x[1:]).tokens.tolist() == [[1, 2, 3, PAD]]


LONG = [sample(4, source="x.jsonl:1"), sample(9, trained_from=2, source="x.jsonl:2"), sample(9, trained_from=8, source="x.jsonl:3")]


def test_too_long_is_an_error():
    with pytest.raises(
        DataError,
        match=r"^x.jsonl:2: too long .got 9 tokens, expected at most 6.: raise data.seq_length, or set data.overlong.*\n  also x.jsonl:3",
    ):
        pack_samples(LONG, 6, pad_id=PAD)
    kept = BadLines("skip", 0.7, lines=3)
    assert len(pack_samples(LONG, 6, pad_id=PAD, bad_lines=kept).samples) == 1 and len(kept) == 2


@pytest.mark.parametrize("overlong, rows_at_8", [("error", None), ("truncate", 3), ("drop", 1)])
def test_exactly_one_row_fits_and_one_token_more_does_not(overlong, rows_at_8):
    assert not pack_samples(LONG, 9, pad_id=PAD, packing=False, overlong=overlong).report.truncated
    assert len(pack_samples(LONG, 9, pad_id=PAD, packing=False, overlong=overlong)) == 3
    trained_early = [LONG[0], LONG[1], sample(9, source="x.jsonl:3")]
    if rows_at_8 is None:
        with pytest.raises(DataError, match="got 9 tokens, expected at most 8"):
            pack_samples(trained_early, 8, pad_id=PAD)
    else:
        assert len(pack_samples(trained_early, 8, pad_id=PAD, packing=False, overlong=overlong)) == rows_at_8


def test_too_long_is_truncated_or_dropped_and_counted():
    cut = pack_samples(LONG, 6, pad_id=PAD, overlong="truncate")
    assert cut.report.truncated == ("x.jsonl:2",) and cut.report.dropped == ("x.jsonl:3",), "nothing of line 3 that is trained is left"
    assert [one.tokens_T.tolist() for one in cut.samples] == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]
    assert "1 truncated, 1 dropped" in str(cut.report)
    dropped = pack_samples(LONG, 6, pad_id=PAD, overlong="drop")
    assert dropped.report.dropped == ("x.jsonl:2", "x.jsonl:3") and dropped.report.samples == 1
    with pytest.raises(DataError, match="no sample is left .got 2, 2 dropped"):
        pack_samples(LONG[1:], 6, pad_id=PAD, overlong="drop")


def test_wrong_arguments():
    for arguments in ({"overlong": "ignore"}, {"seq_length": 1}):
        with pytest.raises(ValueError, match="got .*expected"):
            pack_samples(LONG, **{"seq_length": 9, "pad_id": PAD, **arguments})


def test_the_fingerprint_sees_every_change():
    base = [sample(4), sample(5, first=7)]
    prints = {pack_samples(base, 9, pad_id=PAD).fingerprint()}
    assert prints == {pack_samples([sample(4), sample(5, first=7)], 9, pad_id=PAD).fingerprint()}
    for other in (
        [sample(4), sample(5, first=8)],
        [sample(4), sample(5, first=7, trained_from=2)],
        [sample(4), sample(5, first=7, weight=2.0)],
    ):
        prints.add(pack_samples(other, 9, pad_id=PAD).fingerprint())
    prints.add(pack_samples(base, 10, pad_id=PAD).fingerprint())
    prints.add(pack_samples(base, 9, pad_id=PAD, packing=False).fingerprint())
    assert len(prints) == 6 and all(0 <= p < 2**56 for p in prints)


@st.composite
def samples_with_columns(draw) -> list[Sample]:
    """sample_lists with some of three columns on each sample, every value in them different from all others."""
    names, first, found = ("advantage", "expert", "mine"), 1, []
    for one in draw(sample_lists()):
        columns = {}
        for name in draw(st.sets(st.sampled_from(names))):
            columns[name] = torch.arange(first, first + len(one.tokens_T), dtype=torch.float32)
            first += len(one.tokens_T)
        found.append(replace(one, columns=columns))
    return found


@settings(max_examples=80, deadline=None)
@given(samples=samples_with_columns(), packing=st.booleans(), seq_length=st.integers(12, 30))
def test_columns_follow_their_labels(samples, packing, seq_length):
    """Where a token is the label, its column's value is beside it; where a sample has no such column, 0; and unpacked it is at its token again."""
    rows = pack_samples(samples, seq_length, pad_id=PAD, packing=packing)
    batch = rows.batch([*range(len(rows)), BLANK_ROW])
    assert tuple(batch.columns) == rows.columns == tuple(sorted({name for one in samples for name in one.columns}))
    owner = {int(token): (one, t) for one in samples for t, token in enumerate(one.tokens_T)}
    for name, values in batch.columns.items():
        assert values.shape == batch.tokens.shape and values.dtype == torch.float32
        for token, value in zip(batch.tokens.flatten().tolist(), values.flatten().tolist(), strict=True):
            one, t = owner.get(token, (None, None))
            behind = one is not None and name in one.columns and t + 1 < len(one.tokens_T)
            assert value == (float(one.columns[name][t + 1]) if behind else 0.0), "the value of the token that this place predicts"
        back = rows.unpacked([*range(len(rows)), BLANK_ROW], values)
        for index, one in enumerate(rows.samples):
            expected = one.columns.get(name, torch.zeros(len(one.tokens_T)))
            assert back[index][0] == 0 and torch.equal(back[index][1:], expected[1:])


def test_columns_are_mapped_cut_and_part_of_the_fingerprint():
    def with_column(*values: float) -> Sample:
        return replace(sample(4), columns={"advantage": torch.tensor(values)})

    rows = pack_samples([with_column(1, 2, 3, 4), sample(3, first=7)], 3, pad_id=PAD, overlong="truncate")
    batch = rows.batch([0, 1])
    assert batch.columns["advantage"].tolist() == [[2, 3, 0], [0, 0, 0]]
    doubled = batch.map(lambda x: 2 * x)
    assert doubled.columns["advantage"].tolist() == [[4, 6, 0], [0, 0, 0]] and doubled.tokens.tolist() == (2 * batch.tokens).tolist()
    prints = {pack_samples([one], 9, pad_id=PAD).fingerprint() for one in (sample(4), with_column(1, 2, 3, 4), with_column(1, 2, 3, 5))}
    assert len(prints) == 3
    with pytest.raises(ValueError, match=r"x.jsonl:1: got column 'advantage' of shape \[2\], expected one value per token, \[4\]"):
        with_column(1, 2)
