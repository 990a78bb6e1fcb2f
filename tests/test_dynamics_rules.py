"""What the learning-dynamics studies claim, and which code made it: the numbers of each rule by hand, the hash of an arm's code, the page's sentence."""

import shutil
from pathlib import Path

import pytest

from benchmarks.dynamics import chord_entropy, chord_shift, page, provenance
from benchmarks.dynamics.draw import minus


def test_the_code_of_an_arm_is_all_that_its_numbers_come_from(tmp_path):
    """A loss, the shared loop, and what `run` reaches in its module, at one remove too; not its docstrings, comments, claims or figure."""
    for part in ("benchmarks/dynamics", *(str(Path("megatron_plugin", pattern).parent) for pattern in provenance.LIBRARY)):
        shutil.copytree(provenance._machine.ROOT / part, tmp_path / part, dirs_exist_ok=True)
    own = tmp_path / "benchmarks/dynamics/chord_shift.py"

    def code():
        provenance.code_of.cache_clear()
        return provenance.code_of(own, "run", tmp_path)

    def changes(path, old, new):
        before, text = code(), (tmp_path / path).read_text()
        assert old in text
        (tmp_path / path).write_text(text.replace(old, new, 1))
        return code() != before

    assert code() == provenance.code_of_run(chord_shift.run)
    assert changes("benchmarks/dynamics/chord_shift.py", 'bind("grpo")', 'bind("dapo")'), "way, which run calls"
    assert changes("megatron_plugin/losses/chord.py", "-torch.expm1", "torch.expm1")
    assert changes("benchmarks/dynamics/mixed.py", "evaluated: int = 200", "evaluated: int = 100")
    assert not changes("benchmarks/dynamics/chord_shift.py", "SFT alone shifts", "Supervision alone shifts")
    assert not changes("benchmarks/dynamics/learn.py", "One training step", "A training step")


def shift_records(**rewards):
    """Records of chord_shift with these rewards at steps 0, 16, 96 and 192, S = 16; NLL is 1 - reward."""
    curves = {arm: [[step, value] for step, value in zip((0, 16, 96, 192), values, strict=True)] for arm, values in rewards.items()}
    settings = {"sft_first": 16, "sft_alone": 192}
    found = {arm: [{"end": {"reward": c[-1][1]}, "curve": {"reward": c, "nll": [[s, 1 - v] for s, v in c]}, "settings": settings}] * 3 for arm, c in curves.items()}
    return found | {"base": [{"end": {"reward": 0.3}, "curve": {}, "settings": settings}] * 3}


def test_the_numbers_of_chord_shift_by_hand():
    found = shift_records(rl=(0, 0, 0, 0.6), sft=(0.9, 0.1, 0.5, 0.4), sft_then_rl=(0, 0.2, 0, 0.55), chord_mu=(0, 0.25, 0, 0.7), chord_phi=(0, 0.45, 0, 0.8))
    means = [claim.values[0] for claim in chord_shift.claims(found)]
    assert means == pytest.approx([0.2, 0.4, 0.1, 0.1, 0.1, 0.05, 0.25, 0.15, 0.1, -0.05, 0.2])


def test_no_number_of_chord_shift_is_positive_by_construction():
    """Curves that only rise: there is no fall to be found."""
    rising = dict.fromkeys(("rl", "sft", "sft_then_rl", "chord_mu", "chord_phi"), (0.31, 0.4, 0.5, 0.6))
    falls = {claim.statement: claim.values[0] for claim in chord_shift.claims(shift_records(**rising)) if "dips" in claim.statement or "falls" in claim.statement}
    assert len(falls) == 3 and all(value < 0 for value in falls.values())


def test_a_curve_is_read_at_the_last_noted_step():
    record = {"curve": {"reward": [[0, 0.3], [8, 0.1], [20, 0.6]]}}
    assert [chord_shift.at(record, "reward", step) for step in (0, 7, 8, 19, 20, 99)] == [0.3, 0.3, 0.1, 0.1, 0.6, 0.6]


def test_the_mean_over_a_run_does_not_count_close_points_twice():
    """H falls from 1 to 0 in ten steps and stays there for ten: a quarter, however often the first part is noted."""
    dense = [[step, 1 - step / 10] for step in range(11)] + [[20, 0.0]]
    assert chord_entropy.mean_over_run(dense) == pytest.approx(0.25) and chord_entropy.mean_over_run([dense[0], dense[10], dense[11]]) == pytest.approx(0.25)


def test_curves_less_those_of_a_control():
    found = {"control": [{"curve": {"x": [[0, 1.0], [1, 2.0]]}}], "arm": [{"curve": {"x": [[0, 1.5], [1, 5.0]]}}], "longer": [{"curve": {"x": [[0, 1.0]]}}]}
    lessened = minus(found, "control")
    assert lessened["arm"][0]["curve"]["x"] == [[0, 0.5], [1, 3.0]] and lessened["longer"] == []


def test_the_page_says_which_tree_made_a_run():
    old = {"code": "0ld", "commit": "aaa", "dirty": True, "date": "2026-01-01 10:00 UTC"}
    new = {"code": "n3w", "commit": "bbb", "dirty": False, "date": "2026-01-02 10:00 UTC"}
    said = page.makers({"code": "n3w", "made": {"x": [old, old | {"date": "2026-01-01 10:05 UTC"}], "y": [new, old]}}).splitlines()[2:]
    assert said == ["- 3 runs (x, y): commit aaa with uncommitted changes, 2026-01-01 10:00 UTC to 10:05 UTC; earlier code, not run again since.",
                    "- 1 run (y): commit bbb, 2026-01-02 10:00 UTC; this code."]  # fmt: skip
