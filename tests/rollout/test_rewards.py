"""Rewards: right answers are worth what they should, and a judge that judges nothing is an error.  Answers that hang it: test_worker_pool.py."""

import math
import time

import pytest

from megatron_plugin.rollout import rewards
from megatron_plugin.rollout.rewards import RewardError, RewardResult, RewardSample, make_reward
from megatron_plugin.rollout.worker_pool import Workers
from tests.rollout.reward_samples import USER, causes, samples

WORKED = "She packs 3*4=<<3*4=12>>12 boxes.\nWith 1,200 more that is 1200+12=<<1200+12=1212>>1212.\n#### 1,212"


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
def test_numeric_on_a_worked_reference(reward_of, completion, reward, cause):
    assert reward_of("numeric")(samples(completion, reference=WORKED)) == [RewardResult(reward, cause)]


def test_numeric_cut_off_answers(reward_of):
    cut, right = reward_of("numeric")(samples("12+1200=", "#### 1212 and 5", reference=WORKED, finish_reason="length"))
    assert (cut.cause, right.cause) == ("truncated", "right")


@pytest.mark.parametrize("reference, expected", [("72", "right"), (" $72.0 ", "right"), ("72 apples in 3 bags", "no reference"), ("", "no reference")])
def test_numeric_on_a_bare_reference(reward_of, reference, expected):
    answers = samples("#### 72", reference=reference) + samples("#### 72", reference="#### 72")
    assert causes(reward_of("numeric")(answers)) == [expected, "right"]


def test_numeric_white_space_does_not_hang_it(reward_of):
    """Three optional spaces in a row took 25 s for 2 000 line breaks."""
    begin = time.monotonic()
    assert causes(reward_of("numeric")(samples("####" + "\n" * 50_000 + "x", reference="#### 1"))) == ["no answer"]
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "completion, reference, cause",
    [
        ("so it is $0.5$", "\\frac{1}{2}", "right"),
        ("therefore \\boxed{\\frac{2}{4}}", "$\\frac12$", "right"),
        ("\\boxed{2}", "2\\pi", "wrong"),  # the 2 alone is what math-verify reads of a bare 2\pi
        ("I get \\boxed{1212}.", WORKED, "right"),
        ("#### 1212", WORKED, "right"),
        ("$6$", "\\boxed{3} boxes of 2\n#### 6", "right"),  # of the whole math-verify reads 3
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
    result, control = math_reward(samples(completion, reference=reference) + samples("$7$", reference="7"))
    assert (result.cause, result.reward) == (cause, float(cause == "right")) and control.cause == "right"


@pytest.fixture(scope="module")
def math_reward():
    """One for all: its start costs a second."""
    reward = make_reward("math", timeout_s=30, workers=1)
    yield reward
    reward.close()


def test_the_same_answer_is_judged_once(reward_of, monkeypatch):
    reward, asked = reward_of("format"), []
    judge = Workers.judge
    monkeypatch.setattr(Workers, "judge", lambda self, samples: asked.extend(samples) or judge(self, samples))
    assert causes(reward(samples(*["#### 5"] * 6, "5"))) == ["right"] * 6 + ["format"] and len(asked) == 2


@pytest.mark.parametrize(
    "options, completions, expected",
    [
        ({}, ["a\n#### 12", "#### -1,212.5\n", "12", "#### 12 apples", "#### 12\n#### x", ""], ["right", "right", "format", "format", "format", "empty"]),
        ({"pattern": "<think>.*</think>"}, ["<think>1</think>", "x <think></think>"], ["right", "format"]),
        ({"pattern": "<think>.*</think>", "full_match": False}, ["<think>1</think>", "x <think></think>", "<think>"], ["right", "right", "format"]),
    ],
)
def test_format(reward_of, options, completions, expected):
    results = reward_of("format", **options)(samples(*completions))
    assert causes(results) == expected and [r.reward for r in results] == [float(cause == "right") for cause in expected]


def test_weighted_sum(reward_of):
    reward = reward_of({"numeric": 1.0, "format": 0.1, f"{USER}.length": -0.01})
    both, only_number, nothing = reward(samples("#### 72", "#### 72 x", "72", reference="#### 72"))
    assert both.reward == pytest.approx(1.1 - 0.07) and both.cause == "right" and both.parts == {"numeric": 1.0, "format": 1.0, f"{USER}.length": 7.0}
    assert only_number.reward == pytest.approx(1.0 - 0.09) and only_number.cause == "format"
    assert nothing.reward == pytest.approx(-0.02) and nothing.cause == "no answer"
    assert reward.counts["right"] == 1 and reward.counts["numeric: right"] == 2 and reward.name.startswith("1 numeric + 0.1 format")


def test_user_function(reward_of):
    assert reward_of(f"{USER}.length")(samples("abc", "")) == [RewardResult(3.0, "scored"), RewardResult(0.0, "scored")]
    assert reward_of(f"{USER}.all_fields")([RewardSample("p", "c", "r", "length")])[0].reward == 1.0
    assert [r.reward for r in reward_of(f"{USER}.in_an_array")(samples("a"))] == [0.25]


def test_a_function_that_always_fails_is_an_error(reward_of):
    with pytest.raises(RewardError, match=r"always_raises' judged none of the last 3 answers \(3 error\).*FileNotFoundError: the model that judges.*/user_rewards\.py:\d+\)") as raised:
        reward_of(f"{USER}.always_raises")(samples("a", "b", "c"))
    assert raised.value.exit_code == 5


def test_a_function_that_begins_to_fail_is_an_error_after_a_while(reward_of):
    reward = reward_of(f"{USER}.by_word")
    reward(samples("good", "raise"))
    for _ in range(7):
        assert causes(reward(samples(*["raise"] * 4))) == ["error"] * 4, "one bad group is not the end"
    with pytest.raises(RewardError, match="32 answers|33 answers"):
        reward(samples(*["raise"] * 4))


def test_a_huge_call_that_always_hangs_ends_early(reward_of, monkeypatch):
    monkeypatch.setattr(rewards, "FAILURES", 6)
    reward = reward_of(f"{USER}.by_word", timeout_s=0.05, workers=2)
    with pytest.raises(RewardError, match=r"judged none of the last 6 answers \(6 timeout\)"):
        reward(samples(*["sleep"] * 4000))


def test_no_reference_anywhere_is_an_error(reward_of):
    for name in ("numeric", "math"):
        with pytest.raises(RewardError, match="2 no reference"):
            reward_of(name)(samples("#### 1", "#### 2"))


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
def test_what_is_no_reward_is_refused(reward_of, word, message):
    with pytest.raises(RewardError, match=message):
        reward_of(f"{USER}.returns")(samples(word))


def test_a_coroutine_is_no_reward(reward_of):
    with pytest.raises(RewardError, match="coroutine"):
        reward_of(f"{USER}.asynchronous")(samples("a"))


def test_no_samples(reward_of):
    assert [reward_of(spec)([]) for spec in ("numeric", "format", {"numeric": 1})] == [[], [], []]


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
    "no function": (f"{USER}.lenght", {}, r"has no function 'lenght' \(did you mean 'length'\?\)"),
    "no callable": (f"{USER}.NOT_A_FUNCTION", {}, "has no function 'NOT_A_FUNCTION'"),
    "signature": (f"{USER}.two_arguments", {}, r"takes \(prompts, completions\) .*keywords prompt, completion, reference and finish_reason: add \*\*_"),
    "odd path": (".f", {}, "cannot import ''"),
    "timeout": ("math", {"timeout_s": 0}, "timeout_s=0, "),
    "memory": ("math", {"memory_mb": 0}, "memory_mb=0, "),
    "workers": ("math", {"workers": 0}, "count=0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(reward_of, mistake):
    spec, options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        reward_of(spec, **options)


def test_without_math_verify(reward_of, tmp_path, monkeypatch):
    """Said when the run starts, with the command; the worker finds this package in place of the real one."""
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('no such package')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"needs the package math-verify \(no such package\): pip install 'math-verify"):
        reward_of("math")
