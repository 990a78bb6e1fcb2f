"""IDFT's ramp against its formula on a whole run, its corners, and what it refuses."""

import pytest

from megatron_plugin.schedules.ramp import ramp_schedule

TABLES = {  # (warmup, transition) of 10 steps -> lambda of each
    (0.2, 0.4): [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1],
    (0.0, 0.5): [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1],
    (0.3, 0.0): [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
    (0.0, 0.0): [1] * 10,  # the README's run: no division by 0
    (1.0, 0.0): [0] * 10,
    (0.8, 1.0): [0] * 9 + [0.1],  # longer than the run: it never arrives
}


@pytest.mark.parametrize("ratios", TABLES, ids=str)
def test_tables(ratios):
    got = [ramp_schedule(step, 10, warmup_ratio=ratios[0], transition_ratio=ratios[1]) for step in range(10)]
    assert got == pytest.approx(TABLES[ratios], abs=1e-12)


def test_beyond_the_last_step_it_is_one():
    assert ramp_schedule(12, 10, warmup_ratio=0.2, transition_ratio=0.1) == 1.0


@pytest.mark.parametrize("given, message", [
    (dict(step=-1), "got step=-1, expected a whole number of steps, 0 or more"),
    (dict(step=0.5), "got step=0.5"),
    (dict(steps=0), "got steps=0, expected a whole number of steps, 1 or more"),
    (dict(warmup_ratio=1.5), r"got warmup_ratio=1.5, expected a share of the steps, a number in \[0, 1\]"),
    (dict(transition_ratio=-0.1), "got transition_ratio=-0.1"),
    (dict(transition_ratio=True), "got transition_ratio=True"),
])  # fmt: skip
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ramp_schedule(**(dict(step=0, steps=10, warmup_ratio=0.2, transition_ratio=0.1) | given))
