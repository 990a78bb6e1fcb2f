"""No answer, pattern or function can hang, fill or crash the trainer, and each costs its own reward only."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_plugin.rollout import worker_pool
from megatron_plugin.rollout.reward_worker import Verdict
from megatron_plugin.rollout.rewards import RewardResult
from megatron_plugin.rollout.worker_pool import Workers
from tests.rollout.reward_samples import USER, causes, samples

LIMIT_S = 0.5  # of an answer that hangs; what does not takes milliseconds
SLACK_S = 8.0  # restarts of a worker that imports sympy, on two busy cores

TROUBLE = {
    "sleep": ("timeout", "no verdict within 0.5 s"),
    "deaf": ("timeout", "no verdict within 0.5 s"),
    "memory": ("memory", "more than 256 MiB"),
    "crash": ("crash", "code -11"),
    "leave": ("crash", "code 0"),
    "exit": ("error", "SystemExit: no more"),
    "raise": ("error", "KeyError: 'answer'"),
}


@pytest.mark.parametrize("word", TROUBLE)
def test_a_function_in_trouble_costs_only_its_own_sample(reward_of, word, monkeypatch):
    monkeypatch.setattr(worker_pool, "GRACE_S", 0.2)
    reward = reward_of(f"{USER}.by_word", timeout_s=LIMIT_S, memory_mb=256)
    begin = time.monotonic()
    results = reward(samples(word, "good", word, "good"))
    cause, detail = TROUBLE[word]
    assert causes(results) == [cause, "scored", cause, "scored"] and [r.reward for r in results] == [0, 1, 0, 1]
    assert detail in results[0].detail and reward.counts[cause] == 2
    assert time.monotonic() - begin < 2 * (LIMIT_S + 1) + SLACK_S
    lost = {"error": 0, "timeout": 2, "memory": 3, "crash": 3}[cause]  # the second, which the answer before it may have caused, is asked twice
    assert reward.counts[f"worker {cause}"] == lost


def test_math_answers_that_hang(reward_of):
    """Each is still running at its limit; the next answer is judged as if nothing had been."""
    hanging = ["$9^{9^{9^{9}}}$", "10**10**10", "$1000000!$", "$" + "(" * 3000 + "1" + ")" * 3000 + "$"]
    reward = reward_of("math", timeout_s=LIMIT_S)
    begin = time.monotonic()
    results = reward(samples(*(answer for hung in hanging for answer in (hung, "$5$")), reference="5"))
    assert time.monotonic() - begin < len(hanging) * LIMIT_S + 2 * SLACK_S
    assert [r.reward for r in results] == [0.0, 1.0] * len(hanging) and {r.cause for r in results[::2]} <= {"timeout", "memory", "crash"}


def test_a_pattern_that_hangs(reward_of):
    results = reward_of("format", pattern="(a+)+b", timeout_s=LIMIT_S)(samples("a" * 60, "ab"))
    assert causes(results) == ["timeout", "right"]


def test_memory_that_earlier_answers_kept_is_not_held_against_the_next(reward_of):
    reward = reward_of(f"{USER}.by_word", memory_mb=256)
    assert causes(reward(samples(*["leak"] * 12))) == ["scored"] * 12
    assert reward.counts["worker memory"] >= 2 and reward.counts["worker again"] == reward.counts["worker memory"]


def test_an_answer_is_asked_again_of_a_fresh_worker(reward_of):
    """Both workers are full; the first is free when the answer of the second is to be asked again."""
    reward = reward_of(f"{USER}.by_word", memory_mb=256, workers=2)
    for _ in range(4):
        assert causes(reward(samples("leak", "leak"))) == ["scored"] * 2
    assert not reward.counts["worker memory"]
    assert causes(reward(samples("good", "late leak"))) == ["scored"] * 2
    assert reward.counts["worker memory"] == reward.counts["worker again"] == 1


def test_a_worker_that_was_killed_while_it_waited_costs_nothing(reward_of):
    """As by the kernel when memory is short: the next answer, which finds the pipe broken, is judged by a fresh one."""
    reward = reward_of(f"{USER}.by_word")
    worker = int(reward(samples("pid"))[0].reward)
    os.kill(worker, signal.SIGKILL)
    _assert_gone(worker)
    assert causes(reward(samples("good", "good"))) == ["scored"] * 2 and reward.counts["worker again"] == 1


def test_several_workers_answer_at_once(reward_of):
    reward = reward_of(f"{USER}.by_word", timeout_s=2 * LIMIT_S, workers=4)
    results = reward(samples("pid", "sleep", "pid", "pid", "sleep", "pid", "pid", "pid"))
    assert causes(results) == ["scored", "timeout", "scored", "scored", "timeout", "scored", "scored", "scored"]
    assert len({r.reward for r in results}) >= 3, "one process judged everything"


def test_verdicts_come_in_order():
    with Workers({"kind": "user", "path": f"{USER}.length"}, timeout_s=30, memory_mb=512, count=3) as workers:
        verdicts = workers.judge([dict(prompt="", completion="x" * i, reference=None, finish_reason="stop") for i in range(40)])
    assert verdicts == [Verdict(float(i), "scored") for i in range(40)]


def test_any_text_reaches_the_function(reward_of):
    texts = ["\ud800", "\x00\x1f\u2028", "é" * 200_000, "\n{}\n"]  # the third is longer than a pipe holds
    assert [r.reward for r in reward_of(f"{USER}.length")(samples(*texts))] == [1, 3, 200_000, 4]


def test_what_a_user_function_prints_is_no_reply(reward_of, capfd):
    assert reward_of(f"{USER}.prints")(samples("a", "b")) == [RewardResult(1.0, "scored")] * 2
    assert "and past Python" in capfd.readouterr().err


def test_an_interrupted_call_does_not_answer_the_next(reward_of):
    """Ctrl-C in the midst: the reply that is still to come must not be taken for that of the next sample."""

    def interrupt(*_):
        raise KeyboardInterrupt

    reward = reward_of(f"{USER}.by_word", timeout_s=60)
    reward(samples("good"))
    previous = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            reward(samples("sleep"))
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert reward(samples("good"))[0].reward == 1.0


def test_nothing_is_left_running(reward_of, tmp_path, monkeypatch):
    """A judge's own child is ended with it, and the workers at close."""
    monkeypatch.setenv("REWARD_CHILD_PID", str(tmp_path / "pid"))
    reward = reward_of(f"{USER}.by_word", timeout_s=2 * LIMIT_S)
    assert causes(reward(samples("good", "child"))) == ["scored", "timeout"]
    _assert_gone(int((tmp_path / "pid").read_text()))
    worker = int(reward(samples("pid"))[0].reward)
    reward.close()
    reward.close()
    _assert_gone(worker)


def test_a_worker_ends_with_its_parent(tmp_path):
    """Killed, the parent cannot close anything: the end of the pipe tells the idle worker, its alarm the busy one."""
    script = (
        "import sys; from megatron_plugin.rollout.worker_pool import Workers\n"
        f"w = Workers(dict(kind='user', path='{USER}.by_word'), timeout_s=1, memory_mb=512)\n"
        "print(int(w.judge([dict(completion='pid')])[0].reward), flush=True)\n"
        "w.judge([dict(completion=sys.argv[1])])\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    start = functools.partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    with start([sys.executable, "-c", script, "good"]) as idle, start([sys.executable, "-c", script, "sleep"]) as busy:
        workers = [int(parent.stdout.readline()) for parent in (idle, busy)]
        time.sleep(0.2)
        for parent in (idle, busy):
            parent.kill()
    for worker in workers:
        _assert_gone(worker)


def _assert_gone(pid):
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"process {pid} was left running")
