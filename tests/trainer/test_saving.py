"""Checkpoints on disk: which are kept, in which order a resume tries them, what is on disk when, what a failed save does."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from megatron_plugin.config import load_config, save_config
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.trainer import manifest
from megatron_plugin.trainer.changes import changed_settings, refuse_other_model
from megatron_plugin.trainer.checkpoint import CheckpointError, usable
from megatron_plugin.trainer.manifest import NewerFormatError, digest
from tests import tolerances as tol
from tests.faults.checkpoint_damage import make, world_of_one
from tests.spawn import on_ranks

RANKS, GOLDEN = "tests.trainer.saving_ranks", Path(__file__).parent / "golden"


def test_the_newest_and_the_best_are_kept(tmp_path):
    for found in on_ranks(2, RANKS, "kept", run_dir=tmp_path):
        assert found["after the restart"] == ["best", "latest", "step_00000002", "step_00000003"], "1 was removed; what an interrupted save left is gone"
        assert found["better"] == [False, False, True, False], "the best of the run before the restart counts, lower is better, nan is not"
        assert found["other metric"], "another metric has no best yet"
        assert found["names"] == ["best", "latest", "step_00000002", "step_00000004", "step_00000005"]
        assert found["latest"] == "step_00000005\n" and found["best"] == {"checkpoint": "step_00000002", "metric": "eval/heldout_nll", "value": 2.0}


def test_a_resume_tries_the_newest_of_the_course_that_was_taken(tmp_path):
    first, other = on_ranks(2, RANKS, "tried", run_dir=tmp_path)
    assert first["in order"] == [8, 6, 4, 2]
    assert first["gone back"] == [5, 4, 2, 8, 6], "what the abandoned course has left comes last"
    assert first["killed"] == [7, 5], "complete, but `latest` was not moved"
    assert first["used"] == other["used"] == "step_00000005"
    assert "step_00000007.damaged" in first["names"] and "step_00000008" in first["names"]
    assert "step_00000007 cannot be used" in first["said"][0] and "common.pt: got" in first["said"][0] and not other["said"]


@pytest.mark.parametrize("size", [1, 2])
def test_everything_is_on_disk_before_it_has_its_name(size, tmp_path):
    assert on_ranks(size, RANKS, "on_disk", run_dir=tmp_path) == [[]] * size


def test_the_third_failure_in_a_row_ends_the_run(tmp_path):
    for metrics, text in on_ranks(2, RANKS, "failed", run_dir=tmp_path / "run"):
        assert metrics == [1.0, 2.0]
        assert "could not be saved, the 3rd time in a row" in text and "goes on from its beginning" in text and text.endswith("(exit 3)")


def test_an_asynchronous_save_that_fails_is_said_at_the_next_step(tmp_path):
    for found in on_ranks(2, RANKS, "asynchronous", run_dir=tmp_path):
        assert found == {"during": None, "after": (None, 1.0), "next": 2, "weight": True}


def test_another_model_is_refused_by_name():
    saved = {"num_attention_heads": 4, "rotary_base": 10000, "old": 1}
    refuse_other_model(saved, saved | {"new": 2}, where="x", allowed=())
    with pytest.raises(CheckpointError) as raised:
        refuse_other_model(saved, {"num_attention_heads": 8, "rotary_base": 500000}, where="runs/x", allowed=())
    assert "runs/x is of another model: got model.num_attention_heads 8, expected 4, model.rotary_base 500000, expected 10000" in str(raised.value)
    refuse_other_model(saved, saved | {"rotary_base": 500000}, where="x", allowed=["rotary_base"])


def test_weights_of_the_same_shapes_and_another_meaning_are_refused(problems, tmp_path):
    steps = problems | {"train.steps": 1, "train.warmup_steps": 0, "checkpoint.interval": 0, "train.eval_interval": 0, "train.global_batch": 4}
    steps |= {"data.eval_samples": 2, "data.eval_answers": 0}
    on_ranks(1, "tests.trainer.ranks", "train", overrides=steps | {"run_dir": tmp_path / "run"})
    init, resume = {"run_dir": tmp_path / "other", "checkpoint.init": tmp_path / "run"}, {"run_dir": tmp_path / "run"}
    for place, key, value in ((init, "model.num_attention_heads", 2), (init, "model.rotary_base", 500000), (resume, "model.rotary_percent", 0.5)):
        with pytest.raises(RuntimeError, match=rf"CheckpointError.* is of another model: got {key} {value}, expected"):
            on_ranks(1, "tests.trainer.ranks", "train", overrides=steps | place | {key: value})


def test_what_is_set_otherwise_is_said(tmp_path):
    before = load_config("configs/debug_cpu.yaml", [f"run_dir={tmp_path}"])
    save_config(before, tmp_path / "config.yaml")
    assert changed_settings(before, tmp_path) == []
    now = load_config("configs/debug_cpu.yaml", [f"run_dir={tmp_path}", "loss.name=sft", "train.lr=1e-4", "checkpoint.keep=7"])
    assert changed_settings(now, tmp_path) == ["set otherwise than before: train.lr 0.0001 (was 0.002), loss.name sft (was dft)"]


def test_a_checkpoint_of_the_first_format_is_loaded(tmp_path):
    """Made at commit 58e1e5d by two ranks with the distributed optimizer: no manifest, no record of the model."""
    run = tmp_path / "run"
    shutil.copytree(GOLDEN, run)
    small = {"model.num_layers": 1, "model.hidden_size": 16, "model.num_attention_heads": 2, "data.bpe_vocab_size": 280, "data.seq_length": 64}
    steps = {"train.steps": 4, "train.global_batch": 4, "train.micro_batch": 1, "train.eval_interval": 0, "data.eval_answers": 0, "checkpoint.interval": 2}
    more = {"data.train": GOLDEN / "train.jsonl", "data.overlong": "drop", "loss.name": "sft", "model.make_vocab_size_divisible_by": 8, "run_dir": run,
            "parallel.distributed_optimizer": "true", "data.eval": "[]"}  # fmt: skip
    lines = on_ranks(2, "tests.trainer.ranks", "train", overrides=small | steps | more)[0]
    expected = read_metrics(GOLDEN)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for ours, theirs in zip(lines[2:], expected[2:], strict=True):
        for name in ("train/loss", "train/grad_norm", "train/lr"):
            assert ours[name] == pytest.approx(theirs[name], abs=tol.LAYOUTS, rel=0), (ours["step"], name)
    assert (run / "checkpoints/step_00000004/manifest.json").exists()


def test_a_checkpoint_that_was_being_replaced_is_resumed(problems, tmp_path):
    """As a kill between the two renames leaves it: step_N has no name but step_N.replaced."""
    steps = problems | {"run_dir": tmp_path / "run", "train.steps": 1, "train.warmup_steps": 0, "checkpoint.interval": 0, "train.eval_interval": 0,
                        "checkpoint.resume": "auto", "train.global_batch": 4, "data.eval_samples": 2, "data.eval_answers": 0}  # fmt: skip
    before = on_ranks(1, "tests.trainer.ranks", "train", overrides=steps)[0]
    whole = tmp_path / "run/checkpoints/step_00000001"
    whole.rename(whole.with_suffix(".replaced"))
    after = on_ranks(1, "tests.trainer.ranks", "train", overrides=steps | {"train.steps": 2})[0]
    assert after[:1] == before and len(after) == 2, "the first step was not done again"


@pytest.fixture
def alone(tmp_path):
    with world_of_one(tmp_path):
        yield tmp_path / "run"


def test_a_checkpoint_of_a_newer_version_is_not_taken_for_damage(alone):
    make(alone, 2)
    path = make(alone, 4) / "manifest.json"
    newer = {"files": {"later.bin": {"bytes": 1}}, "format": 3, "signed": True}
    path.write_text(json.dumps(newer | {"sha256": hashlib.sha256(json.dumps(newer, sort_keys=True).encode()).hexdigest()}))
    with pytest.raises(NewerFormatError, match=r"step_00000004/manifest.json: got format 3, expected at most 2: it was written by a newer version") as raised:
        usable(alone, rename=True)
    assert raised.value.exit_code == 3 and path.exists(), "it has its name still"


def test_what_could_not_be_read_this_time_keeps_its_name(alone, monkeypatch, caplog):
    good, unreadable = make(alone, 2), make(alone, 4)

    def refuses(path):
        if path.parent == unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return digest(path)

    with monkeypatch.context() as disk:
        disk.setattr(manifest, "digest", refuses)
        assert usable(alone, rename=True) == good and unreadable.exists()
    assert "step_00000004 cannot be used" in caplog.text and "Input/output error" in caplog.text
    (unreadable / "common.pt").unlink()
    assert usable(alone, rename=True) == good and unreadable.with_suffix(".damaged").exists()
