"""`megatron-plugin realign`: what it hands to the trainer, and mistakes that cost no torch.  (tests/trainer/test_realigning.py has the rest.)"""

import sys
import types
from pathlib import Path

import pytest

from megatron_plugin import cli
from tests.test_cli import HEAVY, command


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """A stand-in for trainer/realigning.py: the tasks that it got, as dictionaries."""
    module, made = types.ModuleType("megatron_plugin.trainer.realigning"), []
    module.RealignTask, module.realign_file = dict, made.append
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("{}\n")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "prompt.txt").write_text("Analyse é,\nwrite # CoT\n", encoding="utf-8")
    return made


def test_what_is_handed_on(calls):
    assert cli.main(["realign", "x.jsonl", "hf"]) == 0
    options = {"samples": 7, "reward": "math", "unaided": 0, "beta": 3.0, "temperature": 0.0, "max_tokens": 99, "splitter": "####", "concurrency": 4,
               "context": 512, "memory": 0.5, "tensor": 2, "seed": 9}  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["realign", "x.jsonl", "hf", "--out", "o", "--analysis-prompt", "prompt.txt", *words]) == 0
    defaults, all_given = calls
    assert defaults == {
        "data": Path("x.jsonl"), "model": Path("hf"), "out": Path("realigned/x"), "samples": 0, "reward": "numeric", "unaided": 1, "beta": 0.7,
        "temperature": 0.3, "max_tokens": 8192, "splitter": "####", "concurrency": 32, "context": 0, "memory": 0.0, "tensor": 1, "seed": 0,
        "score": True,
    }  # fmt: skip
    paths = {"data": Path("x.jsonl"), "model": Path("hf"), "out": Path("o")}
    assert all_given == {**paths, **options, "score": True, "analysis_prompt": "Analyse é,\nwrite # CoT"}


@pytest.mark.parametrize("arguments, code, message", [
    (["nowhere.jsonl", "hf"], 4, "got 'nowhere.jsonl', expected a jsonl file that exists"),
    (["x.jsonl", "nowhere"], 3, "export RUN_DIR DIR makes one of a run"),
    (["x.jsonl"], 2, "required: MODEL_DIR"),
    (["x.jsonl", "hf", "--samples", "0"], 2, "got '0', expected a whole number above 0"),
    (["x.jsonl", "hf", "--unaided", "-1"], 2, "expected a whole number of at least 0"),
    (["x.jsonl", "hf", "--beta", "much"], 2, "invalid float value: 'much'"),
    (["x.jsonl", "hf", "--analysis-prompt", "none.txt"], 4, "got 'none.txt', expected a text file that exists"),
])  # fmt: skip
def test_mistakes(arguments, code, message, calls, capsys):
    assert cli.main(["realign", *arguments]) == code
    assert message in capsys.readouterr().err and not calls


def test_more_than_one_rank_is_refused(calls, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["realign", "x.jsonl", "hf"]) == 2
    assert "expected the command without torchrun" in capsys.readouterr().err and not calls


def test_a_mistake_costs_no_torch():
    code, _, said, _, imported = command("realign", "nowhere.jsonl", "hf")
    assert code == 4 and "expected a jsonl file" in said and not imported & set(HEAVY)
