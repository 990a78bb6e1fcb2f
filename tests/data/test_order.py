"""The stream of rows: each once an epoch, the same under every layout, and continued exactly from a saved position."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_plugin.data import BLANK_ROW, DataError, RowOrder, eval_steps, shard


def stream(order: RowOrder, steps: int) -> list[int]:
    return [row for _ in range(steps) for row in order.next_step()]


@given(num_rows=st.integers(1, 40), global_batch=st.integers(1, 12), seed=st.integers(0, 10), epochs=st.integers(1, 3))
def test_each_row_once_an_epoch(num_rows, global_batch, seed, epochs):
    """Also where a step reaches over the end of an epoch, or holds several epochs."""
    rows = stream(RowOrder(num_rows, global_batch, seed), -(-num_rows * epochs // global_batch))
    for epoch in range(epochs):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_the_seed_and_the_epoch_give_the_order():
    a, b = stream(RowOrder(50, 10, seed=1), 10), stream(RowOrder(50, 10, seed=2), 10)
    assert a == stream(RowOrder(50, 10, seed=1), 10) and a != b and a[:50] != a[50:] and a[:50] != sorted(a[:50])
    assert stream(RowOrder(5, 5, seed=1, shuffle=False), 2) == [0, 1, 2, 3, 4] * 2


def test_the_order_is_the_one_of_all_versions():
    """Written down: a checkpoint of last year's Python or torch must continue with the rows it has not seen."""
    assert RowOrder(10, 10, seed=7).next_step() == [5, 6, 9, 3, 8, 0, 1, 2, 7, 4]


@given(st.data())
def test_every_layout_sees_the_same_rows_each_step(data):
    micro_batch, dp_size, accumulate = (data.draw(st.integers(1, 4)) for _ in range(3))
    rows = RowOrder(37, micro_batch * dp_size * accumulate, seed=3).next_step()
    shards = [shard(rows, dp_rank=rank, dp_size=dp_size, micro_batch=micro_batch) for rank in range(dp_size)]
    assert [row for own in shards for micro in own for row in micro] == rows
    assert all(len(own) == accumulate and all(len(micro) == micro_batch for micro in own) for own in shards)


@given(before=st.integers(0, 12), num_rows=st.integers(1, 30), shuffle=st.booleans())
def test_resume_continues_exactly(before, num_rows, shuffle):
    undisturbed, first = (RowOrder(num_rows, 4, seed=5, shuffle=shuffle, fingerprint=9) for _ in range(2))
    for _ in range(before):
        assert undisturbed.next_step() == first.next_step()
    state = json.loads(json.dumps(first.state_dict()))  # plain ints survive JSON
    assert all(type(value) is int for value in state.values())
    second = RowOrder(num_rows, 4, seed=5, shuffle=shuffle, fingerprint=9)
    second.next_step()  # whatever it did before is forgotten
    second.load_state_dict(state)
    assert [undisturbed.next_step() for _ in range(8)] == [second.next_step() for _ in range(8)]
    assert second.epoch == undisturbed.epoch == (before + 8) * 4 / num_rows


def test_resume_under_another_global_batch():
    """No row twice and none missing when the number of ranks, and with it the global batch, changes."""
    first = RowOrder(24, 8, seed=0)
    rows = stream(first, 2)
    second = RowOrder(24, 4, seed=0)
    second.load_state_dict(first.state_dict())
    assert Counter(rows + stream(second, 2)) == Counter(range(24))


@pytest.mark.parametrize(
    "other, named",
    [
        ({"num_rows": 11}, "num_rows got 11, expected 10"),
        ({"fingerprint": 2}, "fingerprint got 2, expected 1"),
        ({"seed": 4}, "seed got 4, expected 3"),
        ({"shuffle": False}, "shuffle got 0, expected 1"),
    ],
)
def test_a_position_of_other_data(other, named):
    state = RowOrder(10, 2, seed=3, fingerprint=1).state_dict()
    order = RowOrder(**{"num_rows": 10, "global_batch": 2, "seed": 3, "fingerprint": 1, **other})
    with pytest.raises(DataError, match=named):
        order.load_state_dict(state)
    assert order.consumed == 0


def test_a_damaged_position():
    order = RowOrder(10, 2, seed=3)
    for bad in ({}, {**order.state_dict(), "more": 1}, {**order.state_dict(), "consumed": -2}):
        with pytest.raises(DataError, match="position of the data: got"):
            order.load_state_dict(bad)


@given(num_rows=st.integers(1, 40), global_batch=st.integers(1, 12))
def test_evaluation_sees_each_row_once(num_rows, global_batch):
    steps = eval_steps(num_rows, global_batch)
    rows = [row for step in steps for row in step]
    assert [row for row in rows if row != BLANK_ROW] == list(range(num_rows))
    assert all(len(step) == global_batch for step in steps) and len(rows) - num_rows < global_batch


def test_impossible_sizes():
    with pytest.raises(ValueError, match="got a global batch of 10 rows, expected a multiple of 4 .*train.global_batch"):
        shard(list(range(10)), dp_rank=0, dp_size=2, micro_batch=2)
    with pytest.raises(ValueError, match="dp_rank=2"):
        shard(list(range(4)), dp_rank=2, dp_size=2, micro_batch=1)
    with pytest.raises(ValueError, match="micro-batch 0"):
        shard(list(range(4)), dp_rank=0, dp_size=2, micro_batch=0)
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="expected both >= 1"):
            RowOrder(*sizes, seed=0)
