"""The runner of a list of configurations: it goes on after a failure, says which failed, and draws the others."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "run_configs.py"
_spec = importlib.util.spec_from_file_location("run_configs", SCRIPT)
runner = importlib.util.module_from_spec(_spec)
sys.modules["run_configs"] = runner  # dataclasses look their module up
_spec.loader.exec_module(runner)

STAND_IN = """
import json, pathlib, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
steps = int(words["train.steps"])
folder = pathlib.Path(words["run_dir"]); folder.mkdir()
(folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s + 1, "train/loss": 1 / (s + 1)}) + "\\n" for s in range(steps)))
print("said by", folder.name)
if "sleep" in words: time.sleep(60)
sys.exit(int(words.get("exit", 0)))
"""


@pytest.fixture
def trained(monkeypatch):
    """A stand-in for `megatron-plugin train`, which takes a tenth of a second; returns the commands it stood in for."""
    commands = []
    real = runner.command

    def command(run, folder, common, ranks):
        commands.append(real(run, folder, common, ranks))
        return [sys.executable, "-c", STAND_IN, *[word for word in commands[-1] if "=" in word]]

    monkeypatch.setattr(runner, "command", command)
    return commands


@pytest.fixture
def plotted(monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "plot_curves", lambda runs, png, title: calls.append(dict(runs)))
    return calls


def listed(tmp_path, text):
    path = tmp_path / "runs.txt"
    path.write_text(text)
    return [str(path), str(tmp_path / "out")]


def test_a_failure_does_not_stop_the_list(tmp_path, trained, plotted, capsys):
    words = listed(tmp_path, "# three\nfirst a.yaml\nbroken b.yaml exit=7 train.steps=2\nthird c.yaml train.lr=1.0e-3\nempty d.yaml train.steps=0 exit=1\n")
    assert runner.main([*words, "--", "train.steps=3"]) == 1
    summary = {x["label"]: (x["code"], x["steps"]) for x in json.loads((tmp_path / "out/summary.json").read_text())}
    assert summary == {"first": (0, 3), "broken": (7, 2), "third": (0, 3), "empty": (1, 0)}
    assert list(plotted[0]) == ["first", "broken (2 steps)", "third"], "a run without a step has no curve, a broken one says so"
    said = capsys.readouterr().out
    assert "broken: FAILED, exit 7, 2 steps" in said and "said by broken" in said and "said by first" not in said
    assert trained[2][-3:] == [f"run_dir={tmp_path / 'out/third'}", "train.steps=3", "train.lr=1.0e-3"], "the line's own overrides come last"


def test_all_well_is_exit_code_0(tmp_path, trained, plotted):
    assert runner.main([*listed(tmp_path, "one a.yaml\n"), "--", "train.steps=1"]) == 0


def test_a_run_that_takes_too_long_is_stopped(tmp_path, trained, plotted):
    words = listed(tmp_path, "slow a.yaml sleep=1\nnext a.yaml\n")
    assert runner.main([*words, "--limit", "3", "--", "train.steps=1"]) == 1
    first, second = json.loads((tmp_path / "out/summary.json").read_text())
    assert first["code"] is None and first["seconds"] < 30 and second["code"] == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a x.yaml\n\nb\n", "runs.txt:3: got 'b', expected LABEL CONFIG"), ("a x.yaml lr\n", "expected LABEL CONFIG"), ("a x.yaml\na y.yaml\n", "again"),
        ("../a x.yaml\n", "it names a folder"), (".. x.yaml\n", "it names a folder"), ("a x.yaml run_dir=b\n", "expected none"), ("# a x.yaml\n", "got no run"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_read_starts_nothing(tmp_path, trained, capsys, text, expected):
    assert runner.main(listed(tmp_path, text)) == 2
    assert expected in capsys.readouterr().err and not trained and not (tmp_path / "out").exists()


def test_torchrun_where_several_ranks_are_asked_for():
    run = runner.Run("a", "configs/sft.yaml", ("train.lr=1.0e-3",))
    alone, several = runner.command(run, Path("out"), [], 1), runner.command(run, Path("out"), [], 4)
    assert alone[1:5] == ["-m", "megatron_plugin.cli", "train", "configs/sft.yaml"]
    assert several[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m"] and several[6:] == alone[2:]


def test_the_real_command_once(tmp_path):
    """Two steps of the smallest configuration, a configuration that is wrong, and a picture."""
    words = listed(tmp_path, f"tiny {ROOT}/configs/debug_cpu.yaml\nwrong {ROOT}/configs/debug_cpu.yaml train.speed=3\n")
    done = subprocess.run([sys.executable, str(SCRIPT), *words, "--", "train.steps=2", "train.warmup_steps=1"], capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "tiny: done, 2 steps" in done.stdout and "wrong: FAILED, exit 2, 0 steps" in done.stdout and "train.speed" in done.stdout
    assert (tmp_path / "out/compare.png").read_bytes()[:4] == b"\x89PNG"
