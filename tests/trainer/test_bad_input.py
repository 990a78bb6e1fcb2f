"""What a run refuses, before any weight changes, and how the process ends."""

import json

import pytest

from tests.spawn import on_ranks

RANKS = "tests.trainer.ranks"
STEPS = {"train.steps": 3, "checkpoint.interval": 0, "train.eval_interval": 0, "train.global_batch": 4, "data.eval_samples": 2}


@pytest.fixture(autouse=True)
def _base(problems):
    global BASE
    BASE = STEPS | problems


def _error(size: int = 1, **overrides) -> str:
    with pytest.raises(RuntimeError) as raised:
        on_ranks(size, RANKS, "train", overrides=BASE | overrides)
    return str(raised.value)


def _jsonl(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_step_without_a_loss_token_names_its_samples(tmp_path):
    """A weight too small for fp32 on every trained turn: the step would divide by nothing."""
    mute = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "weight": 1e-60}]}
    data = _jsonl(tmp_path / "mute.jsonl", *[mute] * 8)
    message = _error(**{"run_dir": tmp_path / "run", "data.train": data, "data.train_on": "all", "train.global_batch": 2, "train.micro_batch": 1,
                        "data.bpe_vocab_size": 280, "data.eval": "[]"})
    assert "DataError" in message and "no token with a loss" in message and "mute.jsonl" in message


@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_that_is_not_a_number_stops_every_rank_before_the_weights_change(size, tmp_path):
    overrides = {"run_dir": tmp_path / "run", "loss.name": "tests.losses.user_losses.becomes_nan"} | ({"parallel.tensor": 2} if size == 2 else {})
    message = _error(size, **overrides)
    assert "NonFiniteError: step 1: the loss is nan, no weight was changed; the step's samples: " in message and "train.jsonl:" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_needs_inputs_has_none_in_supervised_training(tmp_path):
    message = _error(**{"run_dir": tmp_path / "run", "loss.name": "grpo"})
    assert "ConfigError" in message and "needs inputs.advantage" in message


def test_checkpoints_that_are_not_there(tmp_path):
    message = _error(**{"run_dir": tmp_path / "run", "checkpoint.init": tmp_path})
    assert "CheckpointError" in message and "a directory without a complete checkpoint" in message


def test_resume_never_does_not_overwrite_a_run(tmp_path):
    on_ranks(1, RANKS, "train", overrides=BASE | {"run_dir": tmp_path / "run"})
    message = _error(**{"run_dir": tmp_path / "run", "checkpoint.resume": "never"})
    assert "ConfigError" in message and "already holds step_00000003" in message


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    on_ranks(1, RANKS, "train", overrides=BASE | {"run_dir": tmp_path / "run"})
    message = _error(**{"run_dir": tmp_path / "other", "checkpoint.init": tmp_path / "run", "model.hidden_size": 32})
    assert "CheckpointError" in message and "does not fit this model" in message


def test_other_data_than_the_checkpoints_is_refused(tmp_path):
    on_ranks(1, RANKS, "train", overrides=BASE | {"run_dir": tmp_path / "run"})
    one_less = tmp_path / "one_less.jsonl"
    one_less.write_text("".join(open(BASE["data.train"]).readlines()[1:]))
    message = _error(**{"run_dir": tmp_path / "run", "checkpoint.resume": "auto", "train.steps": 5, "data.train": one_less})
    assert "DataError" in message and "does not fit this data" in message


def test_a_gradient_that_is_not_a_number_is_not_stepped(tmp_path):
    message = _error(**{"run_dir": tmp_path / "run", "loss.name": "tests.losses.user_losses.nan_gradient"})
    assert "NonFiniteError: step 1: the gradient norm is nan, no weight was changed" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_the_trainer_cannot_do_is_refused(tmp_path):
    message = _error(**{"run_dir": tmp_path / "run", "model.window_size": "[8, 0]"})
    assert "ConfigError" in message and "packed samples apart" in message


def test_a_refused_command_leaves_the_runs_record_alone(tmp_path):
    on_ranks(1, RANKS, "train", overrides=BASE | {"run_dir": tmp_path / "run"})
    record = (tmp_path / "run" / "config.yaml").read_text()
    _error(**{"run_dir": tmp_path / "run", "checkpoint.resume": "auto", "train.steps": 5, "seed": 77})
    assert (tmp_path / "run" / "config.yaml").read_text() == record


def test_a_new_learning_rate_holds_after_a_resume(tmp_path):
    on_ranks(1, RANKS, "train", overrides=BASE | {"run_dir": tmp_path / "run"})
    lines = on_ranks(1, RANKS, "train", overrides=BASE | {
        "run_dir": tmp_path / "run", "checkpoint.resume": "auto", "train.steps": 5, "train.lr": 1e-5, "train.lr_decay": "constant"})[0]
    assert lines[-1]["train/lr"] == pytest.approx(1e-5)
