"""mu(step) against hand-checked numbers, its shape at the joints, and arguments that cannot be meant."""

import math

import pytest

from megatron_plugin.losses.chord import EXPERT_TERM
from megatron_plugin.schedules.mu import MU_PRESETS, mu_schedule

TABLES = [  # warmup, decay, peak, valley, {step: mu}
    ((0, 200, 0.9, 0.05), {0: 0.9, 50: 0.77552, 100: 0.475, 150: 0.17448, 199: 0.050052, 200: 0.05}),
    ((200, 400, 0.5, 0.02), {0: 0.0, 100: 0.25, 199: 0.4975, 200: 0.5, 400: 0.26, 599: 0.020007, 600: 0.02}),
    ((0, 0, 0.1, 0.1), {0: 0.1, 1: 0.1, 10**6: 0.1}),
    ((0, 0, 0.9, 0.05), {0: 0.05, 7: 0.05}),  # neither warm-up nor decay: the peak is never reached, as in Trinity and ms-swift
    ((4, 0, 0.8, 0.2), {0: 0.0, 3: 0.6, 4: 0.2}),
]


def mu(step, warmup, decay, peak, valley):
    return mu_schedule(step, warmup_steps=warmup, decay_steps=decay, peak=peak, valley=valley)


@pytest.mark.parametrize("arguments, expected", TABLES)
def test_tables(arguments, expected):
    for step, value in expected.items():
        got = mu(step, *arguments)
        assert isinstance(got, float) and got == pytest.approx(value, abs=5.1e-6 if step in (50, 150) else 6e-7), step


@pytest.mark.parametrize("warmup, decay", [(0, 1), (1, 1), (3, 7), (10, 0), (200, 400)])
def test_shape(warmup, decay):
    values = [mu(step, warmup, decay, 0.7, 0.1) for step in range(warmup + decay + 5)]
    assert all(0 <= value <= 0.7 for value in values)
    rise, fall = values[: warmup + 1], values[warmup:]
    assert decay == 0 or values[warmup] == pytest.approx(0.7)
    assert rise[:warmup] == sorted(rise[:warmup]) and fall == sorted(fall, reverse=True)
    assert values[warmup + decay :] == [0.1] * 5, "the valley begins at warmup + decay, not one step later"


PRESETS = {
    "mu": (0, 200, 0.9, 0.05),
    "phi": (0, 0, 0.1, 0.1),
    "is": (0, 0, 0.1, 0.1),
    "shipped": (200, 400, 0.5, 0.02),
    "trinity": (0, 0, 0.1, 0.1),
}


PRESETS |= {f"chord_{name}": PRESETS[name] for name in ("mu", "phi", "is")}


def test_presets():
    assert {name: tuple(preset.values()) for name, preset in MU_PRESETS.items()} == PRESETS
    for name, arguments in PRESETS.items():
        assert mu_schedule(150, **MU_PRESETS[name]) == mu(150, *arguments)
    assert set(MU_PRESETS) == set(EXPERT_TERM), "loss.preset names a weight and a schedule at once"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1, 0, 10, 0.5, 0.1), "got step=-1, expected a whole number of steps, 0 or more"),
        ((1.5, 0, 10, 0.5, 0.1), "got step=1.5"),
        ((0, -2, 10, 0.5, 0.1), "got warmup_steps=-2"),
        ((0, 0, -2, 0.5, 0.1), "got decay_steps=-2"),
        ((0, 0, "200", 0.5, 0.1), "got decay_steps='200'"),
        ((0, 0, 10, 1.5, 0.1), r"got peak=1.5, expected the share of expert data, a number in \[0, 1\]"),
        ((0, 0, 10, 0.5, -0.1), "got valley=-0.1"),
        ((0, 0, 10, math.nan, 0.1), "got peak=nan"),
        ((0, 0, 10, "0.5", 0.1), "got peak='0.5'"),
        ((0, 0, 10, 0.1, 0.5), "got valley=0.5 above peak=0.1, expected valley <= peak; are they exchanged"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        mu(*arguments)
