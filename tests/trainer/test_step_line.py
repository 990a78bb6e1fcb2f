"""What a person sees of a step: one line of at most 160 columns in a log, a line with a bar on a terminal, nobody else's output in it."""

import io
import os
import re
import sys

import pytest

from megatron_plugin.trainer import step_line as lines
from megatron_plugin.trainer.metrics import RunLog

LAST = "[rank0] NCCL WARN from C, step 4\n"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SUPERVISED = {
    "train/loss": 1.25, "train/nll": 2.5, "train/token_prob": 0.4, "train/entropy": 3.0, "train/weight_mean": 0.4, "train/grad_norm": 1.0, "train/lr": 1e-5,
    "perf/tokens_per_s": 5120.0, "perf/memory_gib": 70.1, "perf/mfu": 0.41,
}  # fmt: skip
ON_POLICY = SUPERVISED | {
    "train/mu": 0.5, "rollout/reward_mean": 0.25, "rollout/len_mean": 812.0, "perf/generate_s": 40.2, "perf/train_s": 30.1, "perf/sync_s": 1.25,
    "rollout/zero_groups": 0.3, "rollout/truncated_frac": 0.1, "rollout/empty": 2.0, "rollout/refused": 1.0, "rollout/reward_failures": 3.0, "rollout/lost_engines": 1.0,
    "rollout/suspected": 1.0, "guard/skipped_steps": 2.0, "guard/stray_labels": 4.0, "train/spike": 1.0,
}  # fmt: skip
EVALUATED = {f"eval/{name}_{kind}": 0.123456 for name in ("heldout", "a_rather_long_name_of_a_set", "ood") for kind in ("nll", "reward_greedy", "accuracy", "asked")}
SETS = {"supervised": SUPERVISED, "on-policy": ON_POLICY, "evaluated": SUPERVISED | EVALUATED, "everything": ON_POLICY | EVALUATED}


@pytest.mark.parametrize("size", [1.0, 1e30, float("nan"), float("-inf")])
@pytest.mark.parametrize("name", SETS)
def test_a_line_has_at_most_160_columns(name, size):
    line = lines.step_line(99_999, 100_000, {metric: value * size for metric, value in SETS[name].items()}, left="123:45:06")
    assert len(line) <= 160 and "\n" not in line and line.startswith("step  99999/100000  loss ")


def test_what_counts_most_stays():
    line = lines.step_line(7, 20, SETS["everything"], left="0:01:02")
    assert line.startswith("step  7/20  loss 1.2500  nll 2.5000") and "reward 0.250" in line and "SPIKE 1" in line and "skipped 2" in line
    assert "sync_s" not in line and "eval/ood_asked" not in line, "there is no room for all"
    assert lines.step_line(7, 20, SUPERVISED, left="0:01:02") == (
        "step  7/20  loss 1.2500  nll 2.5000  p 0.400  H 3.000  w 0.400  gnorm 1.000  lr 1.0e-05  tok/s 5,120  mfu 41.0%  GiB 70.1  left 0:01:02"
    )
    assert lines.step_line(7, 20, {"train/loss": 1.0, "train/spike": 0.0}) == "step  7/20  loss 1.0000"
    assert len(lines.step_line(7, 20, ON_POLICY, width=40)) <= 40


def test_the_time_that_is_left_counts_what_lies_between_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    clock = lines.Clock(last=2)
    assert clock.left(5) == ""
    for seconds in (1000, 10, 20):  # the first one is forgotten
        now[0] += seconds
        clock.tick()
    assert clock.left(300) == "1:15:00" and clock.left(0) == ""


def written(log: RunLog, capsys) -> list[str]:
    log.step(1, ON_POLICY | EVALUATED, show=True)
    log.step(2, SUPERVISED, show=False)
    log.say("two [bold]words[/bold]")
    log.step(3, SUPERVISED, show=True)
    log.close()
    return capsys.readouterr().out.splitlines()


def test_a_log_gets_a_plain_line_for_each_step(tmp_path, capsys):
    """As under torchrun --redirects, and in a pipe."""
    found = written(RunLog(tmp_path, steps=3, resumed_at=0, leader=True), capsys)
    assert [line.split("  ")[0] for line in found] == ["step 1/3", "two [bold]words[/bold]", "step 3/3"]
    assert all(len(line) <= 160 and not ESCAPE.search(line) for line in found)


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """(the slave of a pseudo-terminal as a stream, its number, a function that says what arrived at the master)."""
    master, slave = os.openpty()
    stream = io.TextIOWrapper(os.fdopen(slave, "wb", buffering=0), write_through=True, encoding="utf-8")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def arrived() -> str:
        found = b""
        while not found.endswith(LAST.replace("\n", "\r\n").encode()):  # a read gives what is there by then
            found += os.read(master, 1 << 16)
        return found.decode()

    yield stream, slave, arrived
    stream.close()
    os.close(master)


def on_terminal(tmp_path, terminal, monkeypatch) -> tuple[str, list[str]]:
    stream, slave, arrived = terminal
    monkeypatch.setattr(sys, "stdout", stream)  # here: between a fixture and its test pytest puts its own back
    log = RunLog(tmp_path, steps=4, resumed_at=0, leader=True)
    for step in (1, 2, 3, 4):
        log.step(step, ON_POLICY if step < 3 else SUPERVISED, show=True)
        os.write(slave, f"[rank0] NCCL WARN from C, step {step}\n".encode())  # past Python, as a library's thread does
    log.close()
    monkeypatch.undo()
    text = arrived()
    return text, [ESCAPE.sub("", line) for line in text.replace("\r\n", "\n").splitlines()]


def test_a_terminal_gets_a_bar_and_nobody_is_written_over(tmp_path, terminal, monkeypatch):
    text, found = on_terminal(tmp_path, terminal, monkeypatch)
    assert found[1::2] == [f"[rank0] NCCL WARN from C, step {step}" for step in (1, 2, 3, 4)], "whole, on lines of their own"
    assert all(re.match(r"━+[╸╺]?━* step [1-4]/4  loss 1\.2500", line) and len(line) <= 150 for line in found[::2]), found
    assert "left 0:00:0" in found[4] and "left" not in found[6]
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", text) and "\r" not in text.replace("\r\n", "") and not re.search(r"\x1b\[[0-9]*[AJKHs]", text), "nothing moves the cursor"


def test_no_color(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text, found = on_terminal(tmp_path, terminal, monkeypatch)
    assert not re.search(r"\x1b\[[0-9;]*(3|4|9)[0-9]", text) and "step 4/4" in found[-2]


def test_a_narrow_terminal(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, found = on_terminal(tmp_path, terminal, monkeypatch)
    assert all(line.startswith("step ") and len(line) <= 60 for line in found[::2])
