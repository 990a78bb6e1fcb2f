"""The numbers of `megatron-plugin eval`."""

import itertools
import json
import math

import pytest

from megatron_plugin.report.page import write_page
from megatron_plugin.trainer.answer_numbers import answers_page, numbers_json, pass_at_k, summed_up
from tests.report.runs import HOSTILE


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, c):
    right = [i < c for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def answer(right: bool, tokens: int = 4, finish: str = "stop", text: str = "x") -> dict:
    return {"text": text, "tokens": tokens, "finish": finish, "reward": float(right), "right": right, "cause": "right" if right else "wrong"}


def question(number: int, greedy: bool, sampled: list[bool], **more) -> dict:
    line = {"line": number, "source": f"q.jsonl:{number}", "prompt": HOSTILE, "reference": "#### 4"}
    return line | {"greedy": answer(greedy), "sampled": [answer(right) for right in sampled]} | more


def test_each_question_weighs_the_same_and_a_refused_one_is_wrong():
    lines = [question(1, True, [True, True, True]), question(2, False, [True, False, False]), {
        "line": 3, "source": "q.jsonl:3", "prompt": "long", "reference": "#### 1", "refused": "too long"}]  # fmt: skip
    found = summed_up(lines, n=3)
    means = {name: mean for name, (mean, _) in found.numbers.items()}
    assert means["greedy, right"] == pytest.approx(1 / 3) and means["mean@3"] == means["pass@1"] == pytest.approx((1 + 1 / 3) / 3)
    assert means["pass@2"] == pytest.approx((1 + 2 / 3) / 3) and means["pass@3"] == pytest.approx(2 / 3)
    assert found.refused == 1 and found.questions == 3 and found.causes == {"right": 5, "wrong": 3}
    spread = math.sqrt(((1 - 4 / 9) ** 2 + (1 / 3 - 4 / 9) ** 2 + (4 / 9) ** 2) / 2 / 3)
    assert found.numbers["mean@3"][1] == pytest.approx(spread)
    assert [line["line"] for line in found.failed] == [3]


def test_lengths_and_cuts():
    line = {"line": 1, "source": "q:1", "prompt": "p", "reference": "1", "greedy": answer(True, 2), "sampled": [answer(False, 6, "length"), answer(False, 4)]}
    numbers = summed_up([line], n=2).numbers
    assert numbers["tokens of an answer"][0] == 4 and numbers["cut off"][0] == pytest.approx(1 / 3) and math.isnan(numbers["cut off"][1])
    assert json.loads(numbers_json({"cut off": numbers["cut off"], "nll": [2.5, None]})) == {"cut off": [pytest.approx(1 / 3), None], "nll": [2.5, None]}


def test_greedy_alone():
    found = summed_up([{"line": 1, "source": "q:1", "prompt": "p", "reference": "1", "greedy": answer(False)}], n=0)
    assert found.numbers["greedy, right"] == (0.0, pytest.approx(math.nan, nan_ok=True)) and not any("@" in name for name in found.numbers)


def test_the_page_shows_what_failed_and_obeys_nothing(tmp_path):
    found = summed_up([question(1, False, [False]), {"line": 2, "source": "q:2", "prompt": "p", "reference": "1", "refused": "no <b>room</b>"}], n=1)
    page = write_page(tmp_path / "x.html", "\n\n".join(answers_page(found)), title="").read_text()
    assert "1 questions were refused" in page and "no &lt;b&gt;room&lt;/b&gt;" in page and "<script" not in page and "pass@1" in page
