"""What a run refuses, before any weight changes, and how the process ends."""

import json
import types

import pytest
import safetensors
import torch

from megatron_plugin.data import PackedBatch
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.trainer import replay
from megatron_plugin.trainer.guard import Seen
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
    run_dir = tmp_path / "run"
    overrides = {"run_dir": run_dir, "loss.name": "tests.losses.user_losses.becomes_nan", "train.steps": 5, "checkpoint.interval": 1} | ({"parallel.tensor": 2} if size == 2 else {})
    message = _error(size, **overrides)
    ranks = "rank 0" if size == 1 else "ranks 0, 1"
    assert f"NonFiniteError: step 3: the loss is nan on {ranks}, micro-batch 0, 1 of the step, no weight was changed; the step's samples: " in message
    assert "train.jsonl:" in message and "3 in a row, train.max_nonfinite is 3" in message and not (run_dir / "checkpoints").exists(), "none is saved meanwhile"
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2] and [line["guard/skipped_steps"] for line in lines] == [1, 2], "the third ends the run"
    assert lines[0]["train/loss"] is None and lines[1]["train/nll"] == pytest.approx(lines[0]["train/nll"], rel=0.05), "other samples, the same weights"


def test_a_step_that_was_held_back_can_be_tried_again(tmp_path):
    """Its samples are the lines that were read, its tensors the micro-batch, and the command in step.json meets the same fault."""
    overrides = {"run_dir": tmp_path / "run", "loss.name": "tests.losses.user_losses.becomes_nan", "train.max_nonfinite": 1}
    assert "NonFiniteError: step 1: " in _error(**overrides)
    folder = tmp_path / "run" / "replay" / "step_00000001"
    record = json.loads((folder / "step.json").read_text())
    lines = (folder / "samples.jsonl").read_text().splitlines()
    given = open(BASE["data.train"]).read().splitlines()
    assert lines == [given[int(source.rpartition(":")[2]) - 1] for source in record["samples"]] and record["step"] == 1
    assert record["ranks"][0]["micro_batches"] == [0, 1] and record["ranks"][0]["places"]["0"] and not record["ranks"][0]["weights"]
    with safetensors.safe_open(folder / "rank_0.safetensors", "pt") as file:
        assert file.get_tensor("0.tokens").shape == file.get_tensor("0.labels").shape == (2, 64)
        assert file.get_tensor("0.loss")[file.get_tensor("0.live")].isnan().any()
    words = dict(word.split("=", 1) for word in record["command"].split()[3:])
    assert "checkpoint.init" not in words and int(words["train.global_batch"]) == len(lines) > 2, "there is no checkpoint yet; every sample is tried"
    assert "NonFiniteError: step 1: the loss is nan" in _error(**words | {"loss.name": "tests.losses.user_losses.becomes_nan"})


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
    assert "CheckpointError" in message and "model.hidden_size 32, expected 64" in message and "set model.hidden_size=64" in message


def test_other_data_than_the_checkpoints_is_refused(tmp_path):
    on_ranks(1, RANKS, "train", overrides=BASE | {"run_dir": tmp_path / "run"})
    one_less = tmp_path / "one_less.jsonl"
    one_less.write_text("".join(open(BASE["data.train"]).readlines()[1:]))
    message = _error(**{"run_dir": tmp_path / "run", "checkpoint.resume": "auto", "train.steps": 5, "data.train": one_less})
    assert "DataError" in message and "does not fit this data" in message


def test_a_gradient_that_is_not_a_number_is_not_stepped(tmp_path):
    message = _error(**{"run_dir": tmp_path / "run", "loss.name": "tests.losses.user_losses.nan_gradient", "train.max_nonfinite": 1})
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


@pytest.fixture
def keep(monkeypatch, tmp_path):
    """replay.keep of a step with one bad micro-batch, on a rank, rank 0 having said whether it made the folder; the folder."""
    run = types.SimpleNamespace(config=types.SimpleNamespace(run_dir=str(tmp_path), seed=1, train=types.SimpleNamespace(micro_batch=1)))
    seen = Seen(PackedBatch(*(torch.zeros(1, 2) for _ in range(5))), torch.ones(1, 2).bool(), torch.zeros(1, 2))
    guard = types.SimpleNamespace(run=run, seen=[seen])
    monkeypatch.setattr(replay, "groups", lambda: types.SimpleNamespace(tp=types.SimpleNamespace(rank=lambda: 0)))

    def kept(step, *, rank=0, made=None):
        monkeypatch.setattr(replay.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(replay, "exchange", lambda own: [own if rank == 0 else made])
        return replay.keep(guard, step, "nan", [{"rank": rank, "micro_batches": [0]}], ["x.jsonl:1"])

    return kept, tmp_path / "replay"


def test_a_step_that_cannot_be_kept_does_not_end_the_run(keep, capsys, monkeypatch):
    kept, folder = keep

    def refuses(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(replay, "save_file", refuses)
    assert kept(1) is None and "No space left on device" in capsys.readouterr().out
    folder.joinpath("step_00000001").rmdir()
    folder.rmdir()
    folder.touch()
    assert kept(2) is None and "cannot keep the step" in capsys.readouterr().out


def test_one_rank_counts_the_kept_steps_and_makes_the_folder(keep):
    kept, folder = keep
    assert kept(77, rank=3, made=False) is None and not folder.exists()
    for step in range(replay.MOST):
        assert kept(step) == folder / f"step_{step:08d}"
    assert kept(replay.MOST) is None and len(list(folder.iterdir())) == replay.MOST
    assert kept(replay.MOST - 1), "the same step of a resumed run"
    assert kept(0, rank=3, made=True) and (folder / "step_00000000/rank_3.safetensors").exists()
