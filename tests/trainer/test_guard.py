"""What holds a step back, what it costs, and what a resumed run knows of it."""

import json
import random
import signal

import pytest
import torch

from megatron_plugin.data import DataError, Sample
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.trainer import signals
from megatron_plugin.trainer.labels import check_labels
from megatron_plugin.trainer.spikes import LEAST, Spikes
from tests.spawn import on_ranks

RANKS = "tests.trainer.guard_ranks"
STEPS = {"train.steps": 3, "train.warmup_steps": 0, "checkpoint.interval": 0, "train.eval_interval": 0, "train.global_batch": 4, "data.eval_samples": 2, "data.eval_answers": 0}


@pytest.mark.parametrize("layout", [{}, {"parallel.tensor": 2}, {"parallel.distributed_optimizer": "true"}], ids=["alone", "TP2", "DP2 distributed"])
def test_a_sound_step_reads_nothing_from_the_device_beyond_megatron_core(problems, tmp_path, layout):
    """The vote is copied without waiting and read after the gradient norm, which megatron-core waits for."""
    size = 2 if layout else 1
    for ours, theirs in on_ranks(size, RANKS, "reads_of_a_step", overrides=STEPS | problems | {"run_dir": tmp_path / "run"} | layout):
        assert ours == theirs > 0


def test_stray_labels_are_counted(problems, tmp_path):
    ((found, live),) = on_ranks(1, RANKS, "strays", overrides=STEPS | problems | {"run_dir": tmp_path / "run"})
    assert (found, live) == (6, 8)


def test_a_stray_label_is_refused_where_it_enters():
    good = Sample(torch.tensor([1, 2, 3]), torch.tensor([-100, -100, 3]), torch.ones(3), "x.jsonl:1")
    bad = Sample(torch.tensor([1, 2, 3]), torch.tensor([-100, 9, 3]), torch.ones(3), "x.jsonl:2")
    check_labels([good], 4)
    with pytest.raises(DataError, match=r"^x.jsonl:2: got label 9 at token 1, expected -100 or one in \[0, 9\)"):
        check_labels([good, bad], 9)


def test_spikes_are_above_the_median_of_the_last_hundred():
    spikes = Spikes(10.0)
    for value in [1.0] * LEAST:
        assert not spikes.is_spike(1e9), "the first steps are not judged"
        spikes.add(value)
    assert spikes.is_spike(10.01) and not spikes.is_spike(10.0)
    for _ in range(49):
        spikes.add(50.0)
    assert spikes.is_spike(510.0) and not spikes.is_spike(490.0), "where the level stays up, the median follows"
    assert not Spikes(0.0, [1.0] * 100).is_spike(1e9)
    assert not Spikes(10.0, [-1.0] * 100).is_spike(5.0), "a median of 0 or below says nothing about size"


def test_a_noisy_run_has_no_false_spikes():
    """1,000 steps of a loss that falls from 6 to 0.05 with a scatter of 60 %, ten seeds."""
    for seed in range(10):
        rng, spikes = random.Random(seed), Spikes(10.0)
        for step in range(1000):
            value = (0.05 + 6 * 0.99**step) * rng.lognormvariate(0, 0.6)
            assert not spikes.is_spike(value), (seed, step)
            spikes.add(value)


def test_a_resumed_run_goes_on_counting(problems, tmp_path):
    """in_a_row, skipped and the losses seen are in the checkpoint, so a resumed run judges as the undisturbed one."""
    overrides = STEPS | problems | {"run_dir": tmp_path / "run", "loss.name": "tests.losses.user_losses.becomes_nan", "checkpoint.interval": 2,
                                    "checkpoint.resume": "auto", "train.steps": 2, "train.max_nonfinite": 4}  # fmt: skip
    on_ranks(1, "tests.trainer.ranks", "train", overrides=overrides)
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step_*2/train_state.json")).read_text())
    assert state["data"]["guard"]["in_a_row"] == 2 and state["data"]["guard"]["skipped"] == 2
    with pytest.raises(RuntimeError, match="NonFiniteError: step 4: .* 4 in a row"):
        on_ranks(1, "tests.trainer.ranks", "train", overrides=overrides | {"train.steps": 6})
    assert [line["guard/skipped_steps"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_signal_is_remembered_until_the_end_of_what_is_under_way():
    before = signal.getsignal(signal.SIGTERM)
    with signals.caught():
        assert not signals.asked()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # within a second: one Ctrl-C, passed on twice
        signal.raise_signal(signal.SIGTERM)
        assert signals.asked() == signal.SIGTERM
        with pytest.raises(signals.LeaveError):
            signals.breakable(lambda: 1)()
    assert signal.getsignal(signal.SIGTERM) is before
    with signals.caught():
        assert not signals.asked() and signals.breakable(lambda: 1)() == 1


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    with signals.caught():
        signal.raise_signal(signal.SIGINT)
        later = signals.time.monotonic() + 2
        monkeypatch.setattr(signals.time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_can_be_given_up_is_broken_off_at_once():
    with signals.caught():
        with pytest.raises(signals.LeaveError):
            signals.breakable(lambda: signal.raise_signal(signal.SIGTERM) or pytest.fail("went on"))()
        assert signals.asked() == signal.SIGTERM
    error = signals.stopped(signal.SIGTERM, "saved"), signals.stopped(signal.SIGINT, "saved")
    assert [x.exit_code for x in error] == [143, 130] and str(error[1]) == "stopped by SIGINT: saved"
