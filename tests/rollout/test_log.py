"""rollouts.jsonl: what was sampled can be read again, whatever it was and whenever the run was killed."""

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_plugin.rollout.log import RolloutLine, RolloutLog, cut_rollouts, read_rollouts


def _line(step, **changes):
    fields = dict(
        step=step, source="prompts.jsonl:7", prompt="Tom has 5 apples, finds 7. How many?", completion=f"5+7=12\n#### {step}", tokens=9, reward=1.0,
        cause="right", advantage=0.7, finish_reason="stop", weight_version=step,
    )  # fmt: skip
    return RolloutLine(**{**fields, **changes})


def _write(path, *steps):
    log = RolloutLog(path, resumed_at=0)
    for step in steps:
        log.add([_line(step), _line(step, completion="", reward=0.0, cause="empty")])
    log.close()


def test_lines_come_back(tmp_path):
    path = tmp_path / "run" / "rollouts.jsonl"
    _write(path, 1, 2)
    first, second, *_ = read_rollouts(path)
    assert first == {
        "step": 1, "source": "prompts.jsonl:7", "prompt": "Tom has 5 apples, finds 7. How many?", "completion": "5+7=12\n#### 1", "tokens": 9,
        "reward": 1.0, "cause": "right", "advantage": 0.7, "finish_reason": "stop", "weight_version": 1,
    }  # fmt: skip
    assert (second["completion"], second["cause"]) == ("", "empty") and len(list(read_rollouts(path))) == 4


def test_a_line_is_on_disk_before_close(tmp_path):
    log = RolloutLog(tmp_path / "r.jsonl", resumed_at=0)
    log.add([_line(1)])
    assert len(list(read_rollouts(tmp_path / "r.jsonl"))) == 1
    log.close()
    log.close()


@pytest.mark.parametrize("resumed_at, kept, dropped", [(0, [], 6), (1, [1, 1], 4), (2, [1, 1, 2, 2], 2), (9, [1, 1, 2, 2, 3, 3], 0)])
def test_resume_drops_later_steps(tmp_path, resumed_at, kept, dropped):
    path = tmp_path / "r.jsonl"
    _write(path, 1, 2, 3)
    log = RolloutLog(path, resumed_at=resumed_at)
    assert log.dropped == dropped and [record["step"] for record in read_rollouts(path)] == kept
    log.add([_line(resumed_at + 1)])
    log.close()
    assert [record["step"] for record in read_rollouts(path)] == [*kept, resumed_at + 1]
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_a_directory_is_cut_whoever_wrote_its_files(tmp_path):
    """A run of four leaders is resumed with one: the files of the others hold steps, too, that are done again."""
    names = ["rollouts.jsonl", "rollouts.1.jsonl", "rollouts.12.jsonl"]
    for name in names:
        _write(tmp_path / name, 1, 2, 3)
    (tmp_path / "rollouts.1.jsonl").open("ab").write(b'{"step": 2, "tor')
    others = ["rollouts.jsonl.bak", "rollouts.old.jsonl", "rollouts.1.jsonl.gz", "metrics.jsonl", "my.rollouts.1.jsonl"]
    for name in others:
        (tmp_path / name).write_text('{"step": 3}\n{"step"')
    assert cut_rollouts(tmp_path, resumed_at=2) == 3 * 2 + 1
    for name in names:
        assert [record["step"] for record in read_rollouts(tmp_path / name)] == [1, 1, 2, 2]
    assert all((tmp_path / name).read_text() == '{"step": 3}\n{"step"' for name in others), "a file of somebody else was cut"
    assert sorted(os.listdir(tmp_path)) == sorted(names + others)
    assert cut_rollouts(tmp_path, resumed_at=2) == 0 and cut_rollouts(tmp_path / "none", resumed_at=2) == 0


def test_files_that_have_a_writer_are_left_to_it(tmp_path):
    """Two leaders may be writing already: only the files from number 2 on are nobody's."""
    for name in ("rollouts.jsonl", "rollouts.1.jsonl", "rollouts.2.jsonl", "rollouts.10.jsonl"):
        _write(tmp_path / name, 1, 2)
    assert cut_rollouts(tmp_path, resumed_at=1, first=2) == 4
    steps = {path.name: {record["step"] for record in read_rollouts(path)} for path in tmp_path.iterdir()}
    assert steps == {"rollouts.jsonl": {1, 2}, "rollouts.1.jsonl": {1, 2}, "rollouts.2.jsonl": {1}, "rollouts.10.jsonl": {1}}


def test_resume_when_killed_at_any_byte(tmp_path):
    """Whole lines stay, the torn one goes, and what is added after it is not glued to it."""
    path = tmp_path / "r.jsonl"
    _write(path, 1, 2)
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({*range(0, len(whole), 29), *(end + i for end in ends for i in (-1, 0, 1))}):  # each costs an fsync
        path.write_bytes(whole[:cut])
        log = RolloutLog(path, resumed_at=2)
        log.add([_line(3)])
        log.close()
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert len(records) == whole[:cut].count(b"\n") + 1 and records[-1]["step"] == 3, cut


def test_a_torn_number_is_no_step(tmp_path):
    """'{"step": 1' of step 12 is torn; so is a line that is whole but for its line break."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 1}')
    assert RolloutLog(path, resumed_at=5).dropped == 1 and path.read_bytes() == b'{"step": 1}\n'


def test_lines_that_are_none_of_ours_are_dropped(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'[1]\n\n{"step": "1"}\n{"no": 1}\n\xff\xfe\n{"step": 1}\n')
    assert RolloutLog(path, resumed_at=1).dropped == 5 and [r["step"] for r in read_rollouts(path)] == [1]


def test_a_kill_during_the_cut_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    _write(path, 1, 2)
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RolloutLog(path, resumed_at=1)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert RolloutLog(path, resumed_at=1).dropped == 2 and os.listdir(tmp_path) == ["r.jsonl"]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_any_text_is_one_valid_line(tmp_path_factory, text):
    """Half surrogates, control characters, U+2028: a reader of another language takes the line too, so nothing but ASCII and no lone \\ud800."""
    path = tmp_path_factory.mktemp("log") / "r.jsonl"
    log = RolloutLog(path, resumed_at=0)
    log.add([_line(1, prompt=text, completion=text + "é")])
    log.close()
    data = path.read_bytes()
    assert data.isascii() and data.count(b"\n") == 1 and data.endswith(b"\n")
    read = json.loads(data)["completion"]
    read.encode("utf-8")  # raises for half a pair
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert read == text + "é"


def test_half_surrogates_are_marked_and_pairs_joined(tmp_path):
    log = RolloutLog(tmp_path / "r.jsonl", resumed_at=0)
    log.add([_line(1, prompt="a\ud800b", completion="\ud83d\ude00")])
    log.close()
    record = next(read_rollouts(tmp_path / "r.jsonl"))
    assert record["prompt"] == "a\ufffdb" and record["completion"] == "\U0001f600"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not(tmp_path, value):
    log = RolloutLog(tmp_path / "r.jsonl", resumed_at=0)
    log.add([_line(1, advantage=value)])
    log.close()
    assert b"NaN" not in (tmp_path / "r.jsonl").read_bytes() and next(read_rollouts(tmp_path / "r.jsonl"))["advantage"] is None
