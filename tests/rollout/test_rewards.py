"""Rewards: right answers are worth what they should, and no answer, reference or function can hang, fill or crash the trainer."""

import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_plugin.rollout.reward_worker import Verdict
from megatron_plugin.rollout.rewards import RewardError, RewardResult, RewardSample, make_reward
from megatron_plugin.rollout.worker_pool import Workers

HERE = "tests.rollout.user_rewards"
LIMIT_S = 1.0
SLACK_S = 8.0  # restarts of a worker that imports sympy, on two busy cores
WORKED = "She packs 3*4=<<3*4=12>>12 boxes.\nWith 1,200 more that is 1200+12=<<1200+12=1212>>1212.\n#### 1,212"


@pytest.fixture
def make():
    """make_reward, and every one is closed at the end."""
    made = []

    def build(spec, **options):
        made.append(make_reward(spec, **{"timeout_s": 30, "workers": 1, **options}))
        return made[-1]

    yield build
    for reward in made:
        reward.close()


def _samples(*completions, reference=None, finish_reason="stop"):
    return [RewardSample("p", completion, reference, finish_reason) for completion in completions]


def _causes(results):
    return [result.cause for result in results]


@pytest.mark.parametrize(
    "completion, reward, cause",
    [
        ("12+1200=1212\n#### 1212", 1.0, "right"),
        ("#### 1,212", 1.0, "right"),
        ("#### $1212.00 and so on #### 7", 1.0, "right"),  # the first one counts
        ("#### 7\n#### 1212", 0.0, "wrong"),
        ("#### -1212", 0.0, "wrong"),
        ("#### 12,12.5", 0.0, "wrong"),
        ("the answer is 1212", 0.0, "no answer"),
        ("", 0.0, "empty"),
        (" \n", 0.0, "empty"),
        ("#### \udcff\x00 1212", 0.0, "no answer"),
    ],
)
def test_numeric_on_a_worked_reference(make, completion, reward, cause):
    assert make("numeric")(_samples(completion, reference=WORKED)) == [RewardResult(reward, cause)]


def test_numeric_cut_off_answers(make):
    cut, right = make("numeric")(_samples("12+1200=", "#### 1212 and 5", reference=WORKED, finish_reason="length"))
    assert (cut.cause, right.cause) == ("truncated", "right")


@pytest.mark.parametrize("reference, expected", [("72", "right"), (" $72.0 ", "right"), ("72 apples in 3 bags", "no reference"), ("", "no reference")])
def test_numeric_on_a_bare_reference(make, reference, expected):
    samples = _samples("#### 72", reference=reference) + _samples("#### 72", reference="#### 72")
    assert _causes(make("numeric")(samples)) == [expected, "right"]


def test_numeric_white_space_does_not_hang_it(make):
    """extract_answer alone: 3 s for 1 000 line breaks after the mark, 25 s for 2 000."""
    begin = time.monotonic()
    assert _causes(make("numeric")(_samples("####" + "\n" * 50_000 + "x", reference="#### 1"))) == ["no answer"]
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "completion, reference, cause",
    [
        ("so it is $0.5$", "\\frac{1}{2}", "right"),
        ("therefore \\boxed{\\frac{2}{4}}", "$\\frac12$", "right"),
        ("\\boxed{2}", "\\frac{1}{2}", "wrong"),  # the 2 alone is what math-verify reads of a bare \frac{1}{2}
        ("I get \\boxed{1212}.", WORKED, "right"),
        ("#### 1212", WORKED, "right"),
        ("$x=3$", "x=3", "right"),
        ("$\\{2, 1\\}$", "\\{1,2\\}", "right"),
        ("$(x+1)^2$", "x^2+2x+1", "right"),
        ("$(x+1)^2$", "x^2+2x+2", "wrong"),
        ("no idea", "7", "no answer"),
        ("", "7", "empty"),
        ("$7$", None, "no reference"),
    ],
)
def test_math(math_reward, completion, reference, cause):
    samples = _samples(completion, reference=reference) + _samples("$7$", reference="7")
    result, control = math_reward(samples)
    assert (result.cause, result.reward) == (cause, float(cause == "right")) and control.cause == "right"


@pytest.fixture(scope="module")
def math_reward():
    """One for all: its start costs a second."""
    reward = make_reward("math", timeout_s=30, workers=1)
    yield reward
    reward.close()


@pytest.mark.parametrize("answer", ["$9^{9^{9^{9}}}$", "$2^{2^{2^{40}}}-1$", "10**10**10", "$1000000!$", "$" + "(" * 3000 + "1" + ")" * 3000 + "$"])
def test_math_answers_that_hang(make, answer):
    """Each is still running at its limit of 1 s; the next answer is judged as if nothing had been."""
    reward = make("math", timeout_s=LIMIT_S)
    begin = time.monotonic()
    hung, good = reward(_samples(answer, "$5$", reference="5"))
    assert hung.reward == 0.0 and hung.cause in ("timeout", "memory", "crash") and good.cause == "right", hung
    assert time.monotonic() - begin < LIMIT_S + SLACK_S
    assert reward.counts[hung.cause] == 1 and reward.counts[f"worker {hung.cause}"] >= 1


def test_the_same_answer_is_judged_once(make, monkeypatch):
    reward, asked = make("math"), []
    judge = Workers.judge
    monkeypatch.setattr(Workers, "judge", lambda self, samples: asked.extend(samples) or judge(self, samples))
    assert _causes(reward(_samples(*["$5$"] * 6, "$6$", reference="5"))) == ["right"] * 6 + ["wrong"] and len(asked) == 2


@pytest.mark.parametrize(
    "options, completions, causes",
    [
        ({}, ["a\n#### 12", "#### -1,212.5\n", "12", "#### 12 apples", "#### 12\n#### x", ""], ["right", "right", "format", "format", "format", "empty"]),
        ({"pattern": "<think>.*</think>"}, ["<think>1</think>", "x <think></think>"], ["right", "format"]),
        ({"pattern": "<think>.*</think>", "full_match": False}, ["<think>1</think>", "x <think></think>", "<think>"], ["right", "right", "format"]),
    ],
)
def test_format(make, options, completions, causes):
    results = make("format", **options)(_samples(*completions))
    assert _causes(results) == causes and [r.reward for r in results] == [float(cause == "right") for cause in causes]


def test_a_pattern_that_hangs(make):
    results = make("format", pattern="(a+)+b", timeout_s=LIMIT_S)(_samples("a" * 60, "ab"))
    assert _causes(results) == ["timeout", "right"]


def test_weighted_sum(make):
    reward = make({"numeric": 1.0, "format": 0.1, f"{HERE}.length": -0.01})
    both, only_number, nothing = reward(_samples("#### 72", "#### 72 x", "72", reference="#### 72"))
    assert both.reward == pytest.approx(1.1 - 0.07) and both.cause == "right" and both.parts == {"numeric": 1.0, "format": 1.0, f"{HERE}.length": 7.0}
    assert only_number.reward == pytest.approx(1.0 - 0.09) and only_number.cause == "format"
    assert nothing.reward == pytest.approx(-0.02) and nothing.cause == "no answer"
    assert reward.counts["right"] == 1 and reward.counts["numeric: right"] == 2 and reward.name.startswith("1 numeric + 0.1 format")


def test_user_function(make):
    assert make(f"{HERE}.length")(_samples("abc", "")) == [RewardResult(3.0, "scored"), RewardResult(0.0, "scored")]
    assert make(f"{HERE}.all_fields")([RewardSample("p", "c", "r", "length")])[0].reward == 1.0
    assert [r.reward for r in make(f"{HERE}.in_a_tensor")(_samples("torch", "numpy"))] == [0.5, 0.25]


def test_what_a_user_function_prints_is_no_reply(make, capfd):
    assert make(f"{HERE}.prints")(_samples("a", "b")) == [RewardResult(1.0, "scored")] * 2
    assert "and past Python" in capfd.readouterr().err


def test_any_text_reaches_the_function(make):
    texts = ["\ud800", "\x00\x1f\u2028", "é" * 200_000, "\n{}\n"]  # the third is longer than a pipe holds
    assert [r.reward for r in make(f"{HERE}.length")(_samples(*texts))] == [1, 3, 200_000, 4]


TROUBLE = {
    "sleep": ("timeout", "no verdict within 1 s"),
    "deaf": ("timeout", "no verdict within 1 s"),
    "memory": ("memory", "more than 256 MiB"),
    "crash": ("crash", "code -11"),
    "leave": ("crash", "code 0"),
    "exit": ("error", "SystemExit: no more"),
    "raise": ("error", "KeyError: 'answer'"),
}


@pytest.mark.parametrize("word", TROUBLE)
def test_a_function_in_trouble_costs_only_its_own_sample(make, word):
    reward = make(f"{HERE}.by_word", timeout_s=LIMIT_S, memory_mb=256)
    begin = time.monotonic()
    results = reward(_samples("good", word, "good", word, "good"))
    cause, detail = TROUBLE[word]
    assert _causes(results) == ["scored", cause, "scored", cause, "scored"] and [r.reward for r in results] == [1, 0, 1, 0, 1]
    assert detail in results[1].detail and reward.counts[cause] == 2
    assert time.monotonic() - begin < 2 * (LIMIT_S + 1) + 4 * SLACK_S
    lost = {"error": 0, "timeout": 2, "memory": 4, "crash": 4}[cause]  # those that earlier answers may have caused are asked twice
    assert reward.counts[f"worker {cause}"] == lost


def test_memory_that_earlier_answers_kept_is_not_held_against_the_next(make):
    reward = make(f"{HERE}.by_word", memory_mb=256)
    assert _causes(reward(_samples(*["leak"] * 12))) == ["scored"] * 12
    assert reward.counts["worker memory"] >= 2 and reward.counts["worker again"] == reward.counts["worker memory"]


def test_several_workers_answer_at_once(make):
    reward = make(f"{HERE}.by_word", timeout_s=2 * LIMIT_S, workers=4)
    results = reward(_samples("pid", "sleep", "pid", "pid", "sleep", "pid", "pid", "pid"))
    assert _causes(results) == ["scored", "timeout", "scored", "scored", "timeout", "scored", "scored", "scored"]
    assert len({r.reward for r in results}) >= 3, "one process judged everything"


def test_nothing_is_left_running(make, tmp_path, monkeypatch):
    """A judge's own child is ended with it, and the workers at close."""
    monkeypatch.setenv("REWARD_CHILD_PID", str(tmp_path / "pid"))
    reward = make(f"{HERE}.by_word", timeout_s=LIMIT_S)
    assert _causes(reward(_samples("good", "child"))) == ["scored", "timeout"]
    _assert_gone(int((tmp_path / "pid").read_text()))
    worker = int(reward(_samples("pid"))[0].reward)
    reward.close()
    reward.close()
    _assert_gone(worker)


def test_a_worker_ends_with_its_parent(tmp_path):
    """Killed, the parent cannot close anything: the end of the pipe tells the idle worker, its alarm the busy one."""
    script = (
        "import sys; from megatron_plugin.rollout.worker_pool import Workers\n"
        f"w = Workers(dict(kind='user', path='{HERE}.by_word'), timeout_s=2, memory_mb=512)\n"
        "print(int(w.judge([dict(completion='pid')])[0].reward), flush=True)\n"
        "w.judge([dict(completion=sys.argv[1])])\n"
        "sys.stdin.read()\n"
    )
    for word in ("good", "sleep"):
        with subprocess.Popen([sys.executable, "-c", script, word], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_env()) as parent:
            worker = int(parent.stdout.readline())
            time.sleep(0.2)
            parent.kill()
        _assert_gone(worker)


def _env():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


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


def test_an_interrupted_call_does_not_answer_the_next(make):
    """Ctrl-C in the midst: the reply that is still to come must not be taken for that of the next sample."""

    def interrupt(*_):
        raise KeyboardInterrupt

    reward = make(f"{HERE}.by_word", timeout_s=60)
    reward(_samples("good"))
    previous = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            reward(_samples("sleep"))
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert reward(_samples("good"))[0].reward == 1.0


def test_a_function_that_always_fails_is_an_error(make):
    with pytest.raises(RewardError, match=r"always_raises' judged none of the last 3 answers \(3 error\).*FileNotFoundError: the model that judges") as raised:
        make(f"{HERE}.always_raises")(_samples("a", "b", "c"))
    assert raised.value.exit_code == 5


def test_a_function_that_begins_to_fail_is_an_error_after_a_while(make):
    reward = make(f"{HERE}.by_word")
    reward(_samples("good", "raise"))
    for _ in range(7):
        assert _causes(reward(_samples(*["raise"] * 4))) == ["error"] * 4, "one bad group is not the end"
    with pytest.raises(RewardError, match="32 answers|33 answers"):
        reward(_samples(*["raise"] * 4))


def test_a_huge_call_that_always_hangs_ends_early(make):
    reward = make(f"{HERE}.by_word", timeout_s=0.05, workers=2)
    begin = time.monotonic()
    with pytest.raises(RewardError, match=r"judged none of the last 32 answers \(32 timeout\)"):
        reward(_samples(*["sleep"] * 4000))
    assert time.monotonic() - begin < 32 * 3


def test_no_reference_anywhere_is_an_error(make):
    for name in ("numeric", "math"):
        with pytest.raises(RewardError, match="2 no reference"):
            make(name)(_samples("#### 1", "#### 2"))


@pytest.mark.parametrize(
    "word, message",
    [
        ("nan", "returned nan, expected a finite number"),
        ("inf", "returned inf"),
        ("text", r"returned '0.5' \(str\), expected a finite number"),
        ("none", r"returned None \(NoneType\)"),
        ("list", r"returned \[1.0\] \(list\)"),
        ("complex", "complex"),
        ("huge", "OverflowError"),
    ],
)
def test_what_is_no_reward_is_refused(make, word, message):
    with pytest.raises(RewardError, match=message):
        make(f"{HERE}.returns")(_samples(word))


def test_a_coroutine_is_no_reward(make):
    with pytest.raises(RewardError, match="coroutine"):
        make(f"{HERE}.asynchronous")(_samples("a"))


def test_no_samples(make):
    assert [make(spec)([]) for spec in ("numeric", "format", {"numeric": 1})] == [[], [], []]


MISTAKES = {
    "unknown": ("nummeric", {}, r"unknown reward 'nummeric' \(did you mean 'numeric'\?\); expected one of numeric, math, format, or a function"),
    "nothing near": ("zzz", {}, "unknown reward 'zzz'; expected"),
    "in a sum": ({"numeric": 1.0, "maths": 1.0}, {}, "did you mean 'math'"),
    "empty": ({}, {}, "expected one of numeric"),
    "a list": (["numeric"], {}, r"got \['numeric'\], expected one of"),
    "weight text": ({"numeric": "1"}, {}, "'numeric': got the weight '1', expected a finite number"),
    "weight nan": ({"numeric": math.nan}, {}, "weight nan"),
    "weight bool": ({"numeric": True}, {}, "weight True"),
    "weight 0": ({"numeric": 0}, {}, "weight 0, expected .* other than 0"),
    "pattern": ("format", {"pattern": "("}, r"pattern '\(' is no regular expression: .*unterminated"),
    "no package": ("no_such_package.f", {}, "cannot import 'no_such_package' .*No module named"),
    "no function": (f"{HERE}.lenght", {}, r"has no function 'lenght' \(did you mean 'length'\?\)"),
    "no callable": (f"{HERE}.NOT_A_FUNCTION", {}, "has no function 'NOT_A_FUNCTION'"),
    "signature": (f"{HERE}.two_arguments", {}, r"takes \(prompts, completions\) .*keywords prompt, completion, reference and finish_reason: add \*\*_"),
    "odd path": (".f", {}, "cannot import ''"),
    "timeout": ("math", {"timeout_s": 0}, "timeout_s=0, "),
    "memory": ("math", {"memory_mb": 0}, "memory_mb=0, "),
    "workers": ("math", {"workers": 0}, "count=0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(make, mistake):
    spec, options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make(spec, **options)


def test_without_math_verify(make, tmp_path, monkeypatch):
    """Said when the run starts, with the command; the worker finds this package in place of the real one."""
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('no such package')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"needs the package math-verify \(no such package\): pip install 'math-verify"):
        make("math")


def test_verdicts_come_in_order():
    with Workers({"kind": "user", "path": f"{HERE}.length"}, timeout_s=30, memory_mb=512, count=3) as workers:
        verdicts = workers.judge([dict(prompt="", completion="x" * i, reference=None, finish_reason="stop") for i in range(40)])
    assert verdicts == [Verdict(float(i), "scored") for i in range(40)]
