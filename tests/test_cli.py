"""The command: cheap to ask, one clear message per job, and the documented exit codes."""

import importlib
import os
import re
import resource
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from megatron_plugin import cli
from megatron_plugin.data import DataError

ROOT = Path(__file__).parent.parent
DEBUG = str(ROOT / "configs" / "debug_cpu.yaml")
HEAVY = ("torch", "megatron.core", "transformers", "numpy", "triton")
NOT_RANK = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")}


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No test is a rank unless it says so, and none writes into the repository."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trainer(monkeypatch):
    """A stand-in for trainer/loop.py; returns the configurations it was called with, and raises `.error` if set."""
    module = types.ModuleType("megatron_plugin.trainer.loop")
    module.calls, module.error = [], None

    def train(config):
        module.calls.append(config)
        if module.error:
            raise module.error

    module.train = train
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


class StoppedError(Exception):
    """As trainer/signals.py has it."""

    exit_code = 143

    def __str__(self):
        return "step 5 of 9 is saved"


class Exited(BaseException):
    """What os._exit becomes in these tests."""


@pytest.fixture
def rank(monkeypatch, tmp_path):
    """rank(n, local): this process becomes rank n under a torchrun; returns (its error file, the seconds it has waited)."""
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def leave(code):
        raise Exited(code)

    monkeypatch.setattr(cli.os, "_exit", leave)

    def become(number, local=None):
        local = number if local is None else local
        error_file = tmp_path / "attempt_0" / str(local) / "error.json"
        error_file.parent.mkdir(parents=True, exist_ok=True)
        for name, value in {"RANK": number, "LOCAL_RANK": local, "WORLD_SIZE": 4, "TORCHELASTIC_ERROR_FILE": error_file}.items():
            monkeypatch.setenv(name, str(value))
        return error_file, waited

    return become


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(*arguments):
    """(exit code, stdout, stderr, seconds, imported modules) of `python -m megatron_plugin.cli ...`.

    The seconds are CPU time: the wall clock of a busy machine says little, and nothing here waits for anything."""
    line = [sys.executable, "-X", "importtime", "-m", "megatron_plugin.cli", *arguments]
    before = cpu_seconds()
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=NOT_RANK, timeout=60)
    seconds = cpu_seconds() - before
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    return done.returncode, done.stdout, said, seconds, imported


# ---------------------------------------------------------------- cost


def test_help_takes_half_a_second_and_no_torch():
    code, out, _, seconds, imported = command("--help")
    assert code == 0 and "train" in out and "config" in out and "exit codes" in out
    assert not imported & {*HEAVY, "omegaconf"} and "argparse" in imported
    assert seconds < 0.5


@pytest.mark.parametrize("arguments, expected, message", [
    (("train", DEBUG, "model.num_layer=3"), 2, "command line: model.num_layer: got an unknown key; did you mean 'model.num_layers'?"),
    (("train", DEBUG, "parallel.tensor=2"), 2, "command line: world size: got 1 rank, expected a multiple of 2"),
    (("train", "nowhere.yaml"), 2, "nowhere.yaml: cannot read the configuration: got No such file"),
    (("train", DEBUG, "data.train=nowhere.jsonl"), 4, "command line: data.train: got 'nowhere.jsonl', which is nothing, expected a file with something in it"),
])  # fmt: skip
def test_mistakes_cost_no_torch_and_no_two_seconds(arguments, expected, message):
    code, out, said, seconds, imported = command(*arguments)
    assert (code, out) == (expected, "")
    assert said.startswith(f"megatron-plugin: error: {message}") and len(said.splitlines()) == 1
    assert not imported & set(HEAVY)
    assert seconds < 2


# ---------------------------------------------------------------- one process


def test_train_gets_the_configuration(trainer):
    assert cli.main(["train", DEBUG, "train.steps=7", "parallel.tensor=1"]) == 0
    (config,) = trainer.calls
    assert config.train.steps == 7 and config.sources["train.steps"] == "command line"


def test_config_show_is_a_configuration_with_its_origins(capsys, tmp_path):
    assert cli.main(["config", "show", DEBUG, "train.lr=1e-5"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  lr: 1.0e-05 +# command line$", shown, re.M)
    assert re.search(r"^  steps: 20 +# .*configs/debug_cpu.yaml:\d+$", shown, re.M)
    (tmp_path / "again.yaml").write_text(shown)
    assert cli.main(["config", "show", str(tmp_path / "again.yaml")]) == 0
    bare = re.compile(r" +#.*")
    assert bare.sub("", capsys.readouterr().out) == bare.sub("", shown)


def test_config_show_checks_the_ranks_it_is_told(capsys, monkeypatch):
    assert cli.main(["config", "show", DEBUG, "parallel.tensor=2"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["config", "show", DEBUG, "parallel.tensor=2"]) == 2
    assert "got 3 ranks, expected a multiple of 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "three")
    assert cli.main(["config", "show", DEBUG]) == 2
    assert "WORLD_SIZE: got 'three'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    ([], "required: COMMAND"),
    (["trian", DEBUG], "invalid choice: 'trian'"),
    (["train"], "required: CONFIG"),
    (["config"], "required: ACTION"),
    (["train", DEBUG, "--train.steps=3"], "key=value without dashes"),
    (["train", DEBUG, "train.steps"], "key=value without dashes"),
])  # fmt: skip
def test_usage_errors(capsys, trainer, arguments, message):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out
    assert not trainer.calls


@pytest.mark.parametrize("code", [3, 4, 5, 17])
def test_errors_with_an_exit_code_are_one_message(capsys, trainer, code):
    trainer.error = DataError("no loss token", "x.jsonl:3")
    trainer.error.exit_code = code
    assert cli.main(["train", DEBUG]) == code
    assert capsys.readouterr().err == "megatron-plugin: error: x.jsonl:3: no loss token\n"


def test_unexpected_errors_show_their_traceback(capsys, trainer):
    trainer.error = RuntimeError("a fault of ours")
    assert cli.main(["train", DEBUG]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "test_cli.py" in error and error.endswith("RuntimeError: a fault of ours\n")


def test_what_the_trainer_exits_with_goes_through(trainer):
    trainer.error = SystemExit(143)
    with pytest.raises(SystemExit, match="143"):
        cli.main(["train", DEBUG])
    trainer.error = KeyboardInterrupt()
    assert cli.main(["train", DEBUG]) == 130


def test_console_command_is_main():
    (target,) = re.findall(r'^megatron-plugin = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    module, _, name = target.partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main


# ---------------------------------------------------------------- ranks


def test_rank_0_speaks_at_once(rank, capsys):
    error_file, waited = rank(0)
    with pytest.raises(Exited, match="2"):
        cli.main(["train", DEBUG, "train.lrr=1"])
    assert capsys.readouterr().err.startswith("megatron-plugin: error: command line: train.lrr")
    assert waited == [] and "train.lrr" in error_file.read_text()


def test_another_rank_waits_and_stays_quiet_when_rank_0_has_spoken(rank, capsys, tmp_path):
    error_file, waited = rank(3)
    (tmp_path / "attempt_0" / "0").mkdir()
    (tmp_path / "attempt_0" / "0" / "error.json").write_text("{}")
    with pytest.raises(Exited, match="2"):
        cli.main(["train", DEBUG, "train.lrr=1"])
    assert capsys.readouterr().err == "" and not error_file.exists()
    assert waited == [cli.WAIT_OTHERS]


def test_another_rank_speaks_when_it_is_the_only_one(rank, capsys, trainer):
    error_file, waited = rank(6, local=2)
    trainer.error = DataError("only this rank's lines are bad")
    with pytest.raises(Exited, match="4"):
        cli.main(["train", DEBUG])
    assert capsys.readouterr().err == "rank 6: megatron-plugin: error: only this rank's lines are bad\n"
    assert waited == [cli.WAIT_OTHERS] and error_file.exists()


def test_the_first_rank_of_another_node_is_the_first_to_speak_there(rank, trainer):
    _, waited = rank(4, local=0)
    trainer.error = DataError("x")
    with pytest.raises(Exited):
        cli.main(["train", DEBUG])
    assert waited == [cli.WAIT_LOCAL_ZERO] and cli.WAIT_LOCAL_ZERO < cli.WAIT_OTHERS


def test_a_rank_that_was_stopped_waits_for_nobody(rank, capsys, trainer):
    """Of the seconds between a signal and the end of the job none are spent here."""
    trainer.error = StoppedError()
    for number, said in ((3, ""), (0, "megatron-plugin: step 5 of 9 is saved\n")):
        _, waited = rank(number)
        with pytest.raises(Exited, match="143"):
            cli.main(["train", DEBUG])
        assert waited == [] and capsys.readouterr().err == said


def test_the_first_crash_is_told_and_later_ones_are_a_line(rank, capsys, trainer):
    trainer.error = RuntimeError("the cause")
    first, waited = rank(1)
    with pytest.raises(Exited, match="1"):
        cli.main(["train", DEBUG])
    assert re.match(r"rank 1: Traceback(.|\n)*RuntimeError: the cause\n$", capsys.readouterr().err) and waited == []

    trainer.error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    second, waited = rank(0)
    with pytest.raises(Exited, match="1"):
        cli.main(["train", DEBUG])
    assert capsys.readouterr().err == "rank 0: failed after another rank, with RuntimeError\n"
    assert waited == [cli.WAIT_LOST_PEER, cli.WAIT_OTHERS] and first.exists() and not second.exists()


def test_torchrun_takes_our_error_file(rank, trainer):
    """The file is read by torch itself, whose format it has to have."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    trainer.error = RuntimeError("the cause")
    error_file, _ = rank(1)
    with pytest.raises(Exited):
        cli.main(["train", DEBUG])
    failures = {1: ProcessFailure(1, 7, 1, str(error_file)), 0: ProcessFailure(0, 8, -15, "none")}
    assert "RuntimeError: the cause" in str(ChildFailedError("train", failures)).partition("Root Cause")[2]
    assert [path.name for path in error_file.parent.iterdir()] == ["error.json"]


JOB = """
import os, sys, time, types
module = types.ModuleType("megatron_plugin.trainer.loop")
def train(config):
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
        raise RuntimeError("the cause")
    time.sleep(1000)    # in a collective that rank 1 never enters
module.train = train
sys.modules[module.__name__] = module
from megatron_plugin.cli import main
sys.exit(main(sys.argv[1:]))
"""


def torchrun(*arguments):
    """(seconds, everything on the terminal) of a job of two ranks."""
    start = time.perf_counter()
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=NOT_RANK, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90)
    assert done.returncode != 0
    return time.perf_counter() - start, done.stdout


@pytest.mark.torchrun
def test_a_failing_rank_ends_the_job_and_its_traceback_is_last(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    seconds, text = torchrun(str(tmp_path / "job.py"), "train", DEBUG)
    assert seconds < 60
    last = text.partition("Root Cause (first observed failure)")[2]
    assert "rank      : 1" in last and "Traceback (most recent call last)" in last and "RuntimeError: the cause" in last


@pytest.mark.torchrun
def test_a_mistake_is_told_once_and_again_at_the_end():
    seconds, text = torchrun("-m", "megatron_plugin.cli", "train", DEBUG, "train.lrr=1")
    assert seconds < 30
    assert text.count("\nmegatron-plugin: error: command line: train.lrr") + text.startswith("megatron-plugin: error") == 1
    last = text.partition("Root Cause (first observed failure)")[2]
    assert "exitcode  : 2" in last and "did you mean 'train.lr'?" in last


def test_an_abbreviation_is_refused(capsys):
    assert cli.main(["realign", "x.jsonl", "hf", "--max-token", "64"]) == 2
    assert "--max-token" in capsys.readouterr().err


def test_what_multiprocessing_spawns_of_the_command_ends_with_it(tmp_path):
    """megatron-core's checkpoint writers keep such a process; nothing tells it that the command was killed.  Started by name, as torchrun does."""
    (tmp_path / "spawning.py").write_text(
        "import multiprocessing, os, runpy, signal, sys, types\n"
        "loop = types.ModuleType('megatron_plugin.trainer.loop')\n"
        "def train(config):\n"
        "    queue = multiprocessing.get_context('spawn').Manager().Queue()\n"
        "    open('child', 'w').write(str(multiprocessing.active_children()[0].pid))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.train = train\n"
        "sys.modules[loop.__name__] = loop\n"
        f"sys.argv = ['x', 'train', {DEBUG!r}]\n"
        "runpy.run_module('megatron_plugin.cli', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "spawning.py"], cwd=tmp_path, env=NOT_RANK | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    child, deadline = Path("/proc", (tmp_path / "child").read_text()), time.monotonic() + 20
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists()
