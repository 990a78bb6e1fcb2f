"""What holds a step back, what it costs, and what a resumed run knows of it."""

import json
import random
import signal
import types

import pytest
import torch

from megatron_plugin.data import DataError, Sample
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.trainer import guard as guards
from megatron_plugin.trainer import loop, signals
from megatron_plugin.trainer.guard import Seen
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


def test_a_second_signal_breaks_nothing_off(monkeypatch):
    """The first one has: what runs now is the last save.  One that comes on the way out of `breaking` leaves its mark set."""
    with signals.caught():
        monkeypatch.setattr(signals, "_breaking", True)
        with pytest.raises(signals.LeaveError):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    with signals.caught():
        signal.raise_signal(signal.SIGTERM)
        assert signals.asked()


@pytest.fixture
def leaving(monkeypatch):
    """(loop, what was called) of a run at step 5 of 9, whose saver says what `saved` it has once it has finished."""
    called = []
    saver = types.SimpleNamespace(saved=3, finish=lambda: called.append("finish"))
    run = types.SimpleNamespace(step=5, saver=saver, config=types.SimpleNamespace(train=types.SimpleNamespace(steps=9), run_dir="runs/x"))
    source, log = types.SimpleNamespace(position=lambda: None), types.SimpleNamespace(close=lambda: called.append("close"))
    monkeypatch.setattr(loop, "save", lambda run, position, *, wait: called.append(f"save {run.step} {wait}"))
    monkeypatch.setattr(signals, "agreed", lambda: signal.SIGTERM)
    monkeypatch.setattr(signals, "asked", lambda: signal.SIGTERM)
    return loop._Loop(run, source, log, began_at=2), called


def test_what_a_signal_finds_unsaved_is_saved(leaving):
    """Also where the save of this step was begun, and failed."""
    left, called = leaving
    with pytest.raises(signals.StoppedError, match="step 5 of 9 is saved"):
        left.leave_if_stopped(signals.LeaveError())
    assert called == ["finish", "save 5 True", "close"]
    for saved, began_at in ((5, 2), (None, 5)):
        called.clear()
        left.run.saver.saved, left.began_at = saved, began_at
        with pytest.raises(signals.StoppedError):
            left.leave_if_stopped(signals.LeaveError())
        assert called == ["finish", "close"]


def test_an_error_of_its_own_is_no_stop(leaving):
    """Though a signal came and all is saved: only what a lost peer leaves behind is, and alone a rank enters no collective."""
    left, called = leaving
    left.run.saver.saved = 5
    left.leave_if_stopped(loop.NonFiniteError("step 6"))
    assert called == []
    with pytest.raises(signals.StoppedError):
        left.leave_if_stopped(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert called == ["close"]
    left.run.saver.saved = 3
    left.leave_if_stopped(RuntimeError("Connection closed by peer"))


@pytest.mark.parametrize("active", [False, True], ids=["first rank", "last rank"])
def test_interleaved_chunks_are_told_apart(active, monkeypatch):
    """Two chunks of a rank, two micro-batches; a chunk without the head is watched wherever it is, and the first bad one in the model's order counts."""
    chunks = [torch.nn.Identity(), torch.nn.Identity()]
    run = types.SimpleNamespace(position=None, handle=types.SimpleNamespace(active=active), chunks=chunks,
                                config=types.SimpleNamespace(train=types.SimpleNamespace(spike_factor=10.0), rollout=None))  # fmt: skip
    pipeline = types.SimpleNamespace(rank=lambda: int(active), size=lambda: 2)
    monkeypatch.setattr(guards, "groups", lambda: types.SimpleNamespace(pp=pipeline, dp=pipeline))
    monkeypatch.setattr(guards.dist, "get_rank", lambda: 0)
    guard = guards.Guard(run)
    monkeypatch.setattr(guard, "_gradient_lost", lambda: torch.zeros(()))
    good, bad = torch.ones(2), torch.tensor([1.0, torch.nan])
    for first, later, expected in ((bad, bad, 0), (good, bad, 1)):
        guard.begin()
        for chunk, value in ((0, good), (1, good), (0, first), (1, later)):
            chunks[chunk](value.requires_grad_())
        if active:
            guard.seen = [Seen(None, torch.ones(2).bool(), value.detach()) for value in (good, later)]
        found = guard.found()
        assert (found["stage"], found["micro_batches"]) == (2 * expected + int(active), [1])
