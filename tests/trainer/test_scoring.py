"""`score`: every line of the data once, whatever the layout, the bad lines and the interruptions; against dense fp64 logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_plugin.data import generate
from tests.spawn import on_ranks

ROOT = Path(__file__).parent.parent.parent
RANKS = "tests.trainer.scoring_ranks"
CLOSE = 5e-6  # nats, mean over a sample's tokens (six decimals are kept); measured: TP2 and unpacked 1e-6, other layouts 0, dense fp64 4.7e-7
SMALL = {"train.eval_interval": 0, "train.global_batch": 4, "train.micro_batch": 2, "checkpoint.interval": 0, "loss.name": "sft", "data.bpe_vocab_size": 320,
         "train.steps": 6, "train.lr": 5.0e-3, "data.eval_answers": 0}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, problems) -> str:
    run_dir = tmp_path_factory.mktemp("scored") / "run"
    on_ranks(1, "tests.trainer.ranks", "train", overrides=SMALL | problems | {"run_dir": run_dir})
    return str(run_dir)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """12 samples that fit into a row of 64."""
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in generate("train", 12, seed=5)))
    return str(path)


@pytest.fixture(scope="module")
def alone(run, data, tmp_path_factory) -> Path:
    """The directory of an undisturbed pass on one rank."""
    out = tmp_path_factory.mktemp("alone") / "out"
    on_ranks(1, RANKS, "score", data=data, model=run, out=str(out))
    return out


def scores(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "scores.jsonl").read_text().splitlines()]


def same(ours: list[dict], theirs: list[dict]) -> None:
    assert [one["line"] for one in ours] == [one["line"] for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() and one.get("tokens") == other.get("tokens")
        for name in ("logp", "cll", "entropy", "p", "lowest"):
            assert one[name] == pytest.approx(other[name], abs=CLOSE), (one["line"], name)


def test_a_sample_has_the_numbers_of_its_dense_logits(run, data, alone):
    truth = on_ranks(1, RANKS, "dense", data=data, model=run)[0]
    assert len(truth) == 12
    for (logp, cll), one in zip(truth, scores(alone), strict=True):
        assert (one["logp"], one["cll"]) == (pytest.approx(logp, abs=CLOSE), pytest.approx(cll, abs=CLOSE))
        assert one["cll"] == pytest.approx(one["logp"] + one["entropy"], abs=3e-6)


LAYOUTS = {
    "TP2": (2, ("parallel.tensor=2",)), "PP2": (2, ("parallel.pipeline=2",)), "DP2": (2, ()), "CP2": (2, ("parallel.context=2",)),
    "unpacked": (1, ("data.packing=false",)),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_matter(layout, run, data, alone, tmp_path):
    size, overrides = LAYOUTS[layout]
    on_ranks(size, RANKS, "score", data=data, model=run, out=str(tmp_path / "out"), window=5, overrides=overrides)
    same(scores(tmp_path / "out"), scores(alone))


def test_a_killed_pass_goes_on_and_ends_the_same(run, data, alone, tmp_path):
    """Cut inside a line, as a kill leaves it; taken up by two replicas: no line twice, none missing, those that were there untouched."""
    out = tmp_path / "out"
    on_ranks(1, RANKS, "score", data=data, model=run, out=str(out), samples=7)
    lines = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    (out / "scores.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    said = on_ranks(2, RANKS, "score", data=data, model=run, out=str(out), window=2)[0]
    assert "going on behind line 5" in said and "7 lines," in said
    assert (out / "scores.jsonl").read_bytes().startswith(b"".join(lines[:5]))
    same(scores(out), scores(alone))
    again = on_ranks(1, RANKS, "score", data=data, model=run, out=str(out))[0]
    assert "tokens/s" not in again and len(scores(out)) == 12


def test_scores_of_something_else_are_not_continued(run, data, alone, tmp_path):
    other = tmp_path / "few.jsonl"
    other.write_text("".join(open(data).readlines()[:-1]))
    before = scores(alone)
    for size in (1, 2):
        with pytest.raises(RuntimeError, match="DataError: .*holds scores of something else .*sha256 is .*choose another --out"):
            on_ranks(size, RANKS, "score", data=str(other), model=run, out=str(alone))
    with pytest.raises(RuntimeError, match="seq_length is 128, was 64"):
        on_ranks(1, RANKS, "score", data=data, model=run, out=str(alone), overrides=("data.seq_length=128",))
    assert scores(alone) == before


BAD = [
    {"messages": [{"role": "user", "content": "2+2?"}]},
    {"question": "x " * 300, "answer": "4"},
    {"question": "2+2?", "answer": "4 " * 300},
    {"question": "2+2?", "answer": " "},
]


def test_bad_lines_are_counted_and_named(run, tmp_path):
    data = tmp_path / "bad.jsonl"
    good = next(iter(generate("train", 1, seed=5)))
    data.write_text("".join(json.dumps(line) + "\n" for line in [good, *BAD]) + "{\n" + json.dumps(good) + "\n")
    said = on_ranks(1, RANKS, "score", data=str(data), model=run, out=str(tmp_path / "out"))[0]
    found = scores(tmp_path / "out")
    assert [one["line"] for one in found] == list(range(1, 8))
    assert found[0].items() - {("line", 1)} == found[6].items() - {("line", 7)}, "the same sample twice"
    assert found[1]["problem"].startswith("no assistant turn") and found[2]["problem"].startswith("no token of the answer within the row (got 6")
    assert found[3]["truncated"] and found[3]["tokens"] > 40 and "problem" in found[4] and "not valid JSON" in found[5]["problem"]
    assert "3 of 7 lines scored" in said and "1 samples cut to 64 tokens, 4 lines not scored" in said
    report = (tmp_path / "out" / "report.md").read_text()
    for reason, line in (("no assistant turn", 2), ("no token of the answer within the row", 3), ("not valid JSON", 6)):
        assert f"- 1 x {reason}; first: line {line}" in report


@pytest.mark.parametrize("text, message", [
    ("", "got no line, expected a jsonl file with at least one conversation"),
    ("{\n[]\n", "none of the 2 lines could be scored; line 1: not valid JSON"),
])  # fmt: skip
def test_nothing_to_score_is_an_error_on_every_rank(text, message, run, tmp_path):
    (tmp_path / "none.jsonl").write_text(text)
    with pytest.raises(RuntimeError, match=f"rank 0 of 2: DataError: .*{message}"):
        on_ranks(2, RANKS, "score", data=str(tmp_path / "none.jsonl"), model=run, out=str(tmp_path / "out"))


def test_the_report_has_its_parts(run, data, alone):
    text = (alone / "report.md").read_text()
    found = scores(alone)
    tokens = sum(one["tokens"] for one in found)
    mean = sum(one["cll"] * one["tokens"] for one in found) / tokens
    assert f"Mean cll of an answer token: **{mean:+.3f}** nats" in text and f"12 of 12 lines scored, {tokens} answer tokens" in text
    worst = min(found, key=lambda one: one["cll"])
    first = text.split("| line | tokens |")[1].splitlines()[2]
    assert first.startswith(f"| {worst['line']} | {worst['tokens']} | {worst['cll']:.3f} | {worst['lowest']:.2f} | ") and "**" in first
    assert (alone / "cll.png").stat().st_size > 5000


def test_only_a_window_is_read_at_a_time(data):
    first, read, rest = on_ranks(1, RANKS, "windows", data=data)[0]
    assert first == [5, 6, 7] and read == 7 and rest == [[8, 9, 10], [11]]


@pytest.mark.torchrun
def test_the_command_under_torchrun(run, data, alone, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_plugin.cli", "score", data, run,
            "parallel.tensor=2", "--out", str(tmp_path / "out"), "--worst", "3"]  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("12 of 12 lines scored") == 1 and "The 3 samples" in (tmp_path / "out" / "report.md").read_text()
    same(scores(tmp_path / "out"), scores(alone))
