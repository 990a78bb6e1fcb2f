"""`megatron-plugin score`: what it hands to the trainer, and mistakes that cost no torch."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_plugin import cli
from tests.test_cli import HEAVY, command


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """A stand-in for trainer/scoring.py: the calls that it got."""
    module, made = types.ModuleType("megatron_plugin.trainer.scoring"), []

    @dataclass(frozen=True)
    class Task:
        data: Path
        out: Path
        samples: int
        worst: int
        rows: int
        url: str

    module.Task = Task
    module.score_with_checkpoint = lambda *given, **named: made.append(("checkpoint", given, named))
    module.score_with_directory = lambda *given, **named: made.append(("directory", given, named))
    module.score_with_engine = lambda *given, **named: made.append(("engine", given, named))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("megatron_plugin.cli.data_commands.before_megatron", lambda: None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("{}\n")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "runs" / "a" / "checkpoints" / "step_00000002").mkdir(parents=True)
    return made


def test_what_is_handed_on(calls, monkeypatch):
    assert cli.main(["score", "x.jsonl", "runs/a"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["score", "x.jsonl", "runs/a", "parallel.tensor=2", "data.seq_length=64", "--out", "o", "--samples", "7", "--worst", "3", "--rows", "2"]) == 0
    monkeypatch.delenv("WORLD_SIZE")
    assert cli.main(["score", "x.jsonl", "hf", "--url", "http://127.0.0.1:1"]) == 0
    (_, (first, model, overrides), named), (_, (second, _, layout), wide), (kind, (third, directory), _) = calls
    assert (first.data, first.out, first.samples, first.worst, first.rows) == (Path("x.jsonl"), Path("scores/x"), 0, 20, 8)
    assert (model, overrides, named) == ("runs/a", [], {"world_size": 1})
    assert (second.out, second.samples, second.worst, second.rows) == (Path("o"), 7, 3, 2)
    assert layout == ["parallel.tensor=2", "data.seq_length=64"] and wide == {"world_size": 4}
    assert (kind, directory, third.url) == ("engine", "hf", "http://127.0.0.1:1")


@pytest.mark.parametrize("arguments, code, message", [
    (["nowhere.jsonl", "runs/a"], 4, "got 'nowhere.jsonl', expected a jsonl file that exists"),
    (["x.jsonl"], 2, "required: RUN_OR_CHECKPOINT"),
    (["x.jsonl", "runs/a", "--samples", "0"], 2, "got '0', expected a whole number above 0"),
    (["x.jsonl", "runs/a", "--rows", "2", "parallel.tensor=2"], 2, "unrecognized arguments: parallel.tensor=2; overrides stand together"),
    (["x.jsonl", "hf", "parallel.tensor=2", "--url", "http://127.0.0.1:1"], 2, "got 'parallel.tensor=2' beside --url, expected no overrides"),
])  # fmt: skip
def test_mistakes(arguments, code, message, calls, capsys):
    assert cli.main(["score", *arguments]) == code
    assert message in capsys.readouterr().err and not calls


def test_a_mistake_costs_no_torch():
    code, _, said, _, imported = command("score", "nowhere.jsonl", "runs/a")
    assert code == 4 and "expected a jsonl file" in said and not imported & set(HEAVY)
