"""IDFT's ramp reaches the loss of a real training, in every layout the same, and a resumed run has that of the undisturbed one."""

import shutil

import pytest

from tests import tolerances as tol
from tests.spawn import on_ranks

STEPS = 8
RAMP = [0.0, 0.0, 0.25, 0.75, 1.0, 1.0, 1.0, 1.0]  # warm-up over 3/16 of 8 steps, transition over 1/4: progress 2/8 is a quarter of the way
SCHEDULE = {"ramp.warmup_ratio": 0.1875, "ramp.transition_ratio": 0.25}
SMALL = {"train.eval_interval": 0, "train.global_batch": 4, "train.micro_batch": 2, "checkpoint.interval": 4, "checkpoint.keep": 0, "data.bpe_vocab_size": 320,
         "train.steps": STEPS, "train.lr": 2.0e-3, "data.eval_answers": 0, "data.eval": "[]", "model.num_layers": 2}  # fmt: skip


def train(size: int, run_dir, **overrides) -> list[dict]:
    return on_ranks(size, "tests.trainer.ranks", "train", overrides=SMALL | {"run_dir": run_dir} | overrides)[0]


@pytest.fixture(scope="module")
def base(problems):
    return {key: value for key, value in problems.items() if key != "data.eval"}


@pytest.fixture(scope="module")
def idft(base, tmp_path_factory):
    """(run directory, lines) of an undisturbed run on one rank."""
    run_dir = tmp_path_factory.mktemp("idft") / "run"
    return run_dir, train(1, run_dir, **base, **SCHEDULE, **{"loss.name": "idft"})


def test_the_steps_of_the_warm_up_are_those_of_dft_and_later_ones_are_not(idft, base, tmp_path):
    _, lines = idft
    assert [line["train/ramp"] for line in lines] == pytest.approx(RAMP, abs=1e-12)
    short = base | {"train.steps": 3, "train.lr_decay": "constant"}
    dft = train(1, tmp_path / "dft", **short, **{"loss.name": "dft"})
    flat = train(1, tmp_path / "flat", **short, **{"loss.name": "idft", "ramp.warmup_ratio": 0.5, "ramp.transition_ratio": 0.0})
    assert [line["train/ramp"] for line in flat] == [0.0, 0.0, 1.0] and "train/ramp" not in dft[0]
    for ours, theirs in zip(flat[:2], dft[:2], strict=True):
        assert ours["train/gamma"] == 1.0 and all(ours[name] == theirs[name] for name in ("train/loss", "train/grad_norm", "train/weight_mean", "train/nll"))
    assert flat[2]["train/gamma"] != 1.0 and flat[2]["train/nll"] == dft[2]["train/nll"] and flat[2]["train/grad_norm"] != dft[2]["train/grad_norm"]


def test_cll_is_reported_as_mean_and_shares(base, tmp_path):
    """With any loss; a few steps from random weights are enough for surprising tokens."""
    lines = train(1, tmp_path / "run", **base, **{"loss.name": "sft", "train.lr": 1e-2, "train.steps": 30})
    for line in lines:
        assert line["train/cll_mean"] == pytest.approx(line["train/entropy"] - line["train/nll"], abs=1e-5)
        shares = [line[f"train/cll_below_minus_{nats}"] for nats in (1, 3, 5)]
        assert line["train/cll_above_0"] > 0 and 1 - line["train/cll_above_0"] >= shares[0] >= shares[1] >= shares[2] >= 0
    assert lines[-1]["train/cll_below_minus_1"] > 0  # the first steps only learn which tokens there are: all of them are likelier than typical


LAYOUTS = {"TP2+SP": {"parallel.tensor": 2, "parallel.sequence": "true"}, "CP2": {"parallel.context": 2}, "DP2": {}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same(layout, idft, base, tmp_path):
    lines = train(2, tmp_path / "run", **base, **SCHEDULE, **LAYOUTS[layout], **{"loss.name": "idft"})
    for ours, theirs in zip(lines, idft[1], strict=True):
        for name in ("train/loss", "train/gamma", "train/grad_norm", "train/ramp", "train/cll_mean", "train/cll_above_0"):
            assert ours[name] == pytest.approx(theirs[name], abs=2 * tol.LAYOUTS, rel=0), (ours["step"], name)


def test_a_resumed_run_has_the_ramp_of_the_undisturbed_one(idft, base, tmp_path):
    run_dir, lines = idft
    cut = tmp_path / "cut"
    shutil.copytree(run_dir, cut)
    shutil.rmtree(cut / "checkpoints" / "step_00000008")
    resumed = train(1, cut, **base, **SCHEDULE, **{"loss.name": "idft", "checkpoint.resume": "auto"})
    assert len(resumed) == STEPS
    for ours, theirs in zip(resumed, lines, strict=True):
        assert {k: v for k, v in ours.items() if not k.startswith("perf/")} == {k: v for k, v in theirs.items() if not k.startswith("perf/")}


@pytest.mark.parametrize("overrides, message", [
    ({"loss.name": "dft"}, "ConfigError: command line: ramp: got a schedule, expected none: loss dft has no parameter ramp"),
    ({"loss.name": "idft", "loss.ramp": 0.5}, "ConfigError: command line: loss.ramp: got 0.5 beside a section ramp, expected one of the two"),
    ({"loss.name": "idft", "ramp.warmup_ratio": 1.5}, "ConfigError: command line: ramp.warmup_ratio: got 1.5, expected a number in"),
])  # fmt: skip
def test_what_is_refused(overrides, message, base, tmp_path):
    with pytest.raises(RuntimeError, match=message):
        train(1, tmp_path / "run", **base, **(SCHEDULE | overrides))
