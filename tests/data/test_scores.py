"""Scores of samples: means by hand, a file that any kill leaves usable, and sums over tokens rather than samples."""

import json
import math

import pytest
import torch

from megatron_plugin.data import DataError, Sample
from megatron_plugin.data.scores import ScoreFile, read_scores, sample_score, summarise


def sample(trained: list[int]) -> Sample:
    tokens_T = torch.arange(5, 5 + len(trained))
    live_T = torch.tensor(trained) > 0
    return Sample(tokens_T, torch.where(live_T, tokens_T, -100), live_T.float(), "x.jsonl:1")


def test_means_are_over_the_trained_tokens():
    """The first token is never predicted, whatever its label says; an untrained one holds anything."""
    logp_T = torch.tensor([math.nan, math.nan, -0.5, -6.5, -1.0])
    entropy_T = torch.tensor([math.nan, math.nan, 1.0, 0.5, 1.0])
    got = sample_score(sample([1, 0, 1, 1, 1]), logp_T, entropy_T)
    p = (math.exp(-0.5) + math.exp(-6.5) + math.exp(-1.0)) / 3
    assert got == {
        "tokens": 3, "logp": pytest.approx(-8 / 3, abs=1e-6), "p": pytest.approx(p, abs=1e-6), "cll": pytest.approx(-5.5 / 3, abs=1e-6),
        "entropy": pytest.approx(2.5 / 3, abs=1e-6), "cll_above_0": pytest.approx(1 / 3, abs=1e-6), "cll_below_minus_1": pytest.approx(1 / 3, abs=1e-6),
        "cll_below_minus_3": pytest.approx(1 / 3, abs=1e-6), "cll_below_minus_5": pytest.approx(1 / 3, abs=1e-6), "lowest": -6.0, "lowest_at": 3,
    }  # fmt: skip
    assert json.loads(json.dumps(got)) == got


def test_without_entropies_there_is_no_cll():
    got = sample_score(sample([0, 1, 1]), torch.tensor([0.0, -1.0, -3.0]), None)
    assert got == {"tokens": 2, "logp": -2.0, "p": pytest.approx((math.exp(-1) + math.exp(-3)) / 2, abs=1e-6), "lowest": -3.0, "lowest_at": 2}


def test_a_sample_without_a_predicted_token_is_an_error():
    with pytest.raises(DataError, match="x.jsonl:1: no token of an answer to score"):
        sample_score(sample([1, 0, 0]), torch.zeros(3), torch.zeros(3))


LINES = [{"line": 1, "tokens": 2, "logp": -1.0, "p": 0.5}, {"line": 2, "problem": "zerschnitten: \u00fcber"}, {"line": 3, "tokens": 1, "logp": -4.0, "p": 0.1}]


def test_a_file_cut_anywhere_goes_on_behind_its_last_whole_line(tmp_path):
    path = tmp_path / "scores.jsonl"
    file = ScoreFile(path)
    file.append(LINES)
    file.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        file = ScoreFile(path)
        assert file.lines == whole[:cut].count(b"\n")
        file.append(LINES[file.lines :])
        file.close()
        assert path.read_bytes() == whole


def test_rubbish_in_the_middle_is_done_again_and_the_order_is_kept(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"line": 1, "tokens": 2, "logp": -1.0, "p": 0.5}\n{"line": 3}\n{"line": 3}\n')
    file = ScoreFile(path)
    assert file.lines == 1
    with pytest.raises(ValueError, match="got the score of line 3, expected that of line 2"):
        file.append(LINES[2:])
    file.close()


def test_the_sum_weighs_tokens_and_lists_the_worst_first():
    found = summarise([*LINES, {"line": 4, "tokens": 5, "logp": -2.0, "p": 0.2, "truncated": True}, {"line": 5, "problem": "zerschnitten: again"}], worst=2)
    assert (found.lines, found.samples, found.tokens, found.truncated) == (5, 3, 8, 1)
    assert found.problems == {"zerschnitten": 2} and found.examples["zerschnitten"]["line"] == 2
    assert found.means == pytest.approx({"logp": (-2 - 4 - 10) / 8, "p": (1 + 0.1 + 1) / 8})
    assert found.ranked_by == "logp" and [score["line"] for score in found.worst] == [3, 4]
    assert found.columns["logp"].tolist() == [-1.0, -4.0, -2.0] and "cll" not in found.columns


def test_the_worst_are_those_with_the_lowest_cll_not_the_lowest_log_p():
    lines = [{"line": n, "tokens": 1, "logp": logp, "p": 0.1, "cll": cll} for n, (logp, cll) in enumerate([(-5, 0.5), (-1, -0.5), (-2, -0.25)], 1)]
    assert [score["line"] for score in summarise(lines, worst=2).worst] == [2, 3]


def test_reading_back(tmp_path):
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert list(read_scores(tmp_path / "s.jsonl")) == LINES


def test_one_process_writes_at_a_time(tmp_path):
    first = ScoreFile(tmp_path / "scores.jsonl")
    with pytest.raises(DataError, match="another process is writing"):
        ScoreFile(tmp_path / "scores.jsonl")
    first.close()
    ScoreFile(tmp_path / "scores.jsonl").close()
