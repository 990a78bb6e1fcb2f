"""What is computed about samples before a step: corrections of whole completions, old log-probabilities, those of the reference."""

import math

import pytest

from tests.spawn import on_ranks
from tests.trainer.rollout_ranks import write_questions

RANKS = "tests.trainer.policy_ranks"
LOG_RATIOS = [[0.0, 1.2, -0.7], [-1.2]]  # by rank: sums of log p - log p of the engine over four tokens
ADVANTAGES = [[1.0, 1.0, -1.0], [1.0]]
LOW, LOWEST = math.exp(-0.7), math.exp(-1.2)
CORRECTED = {  # correction, bound -> weights by rank, the demonstration's 2 last; share of the four completions
    ("sequence_mask", 2.0): ([[1, 0, LOW, 2], [LOWEST, 2]], 1 / 4),
    ("sequence_tis", 2.0): ([[1, 2, LOW, 2], [LOWEST, 2]], 1 / 4),
    ("sequence_tis", 0.9): ([[0.9, 0.9, LOW, 2], [LOWEST, 2]], 2 / 4),
    ("opsm", 0.1): ([[1, 1, 0, 2], [1, 2]], 1 / 4),  # mean log p of the engine - log p is .175 where the advantage is negative
    ("opsm", 0.2): ([[1, 1, 1, 2], [1, 2]], 0.0),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Two data-parallel ranks, one of them the leader."""
    folder = tmp_path_factory.mktemp("questions")
    data = {f"data.{key}": write_questions(folder, key, 16) for key in ("train", "prompts", "eval")} | {"run_dir": folder / "run"}
    calls = {
        "columns": (f"{RANKS}:columns_of_a_batch", {"updates": [1, 2]}),
        "reference": (f"{RANKS}:reference", {"overrides": {"loss.kl": 0.1}}),
    } | {
        f"{name} {bound}": (f"{RANKS}:corrected", {
            "overrides": {"rollout.correction": name, "rollout.correction_bound": bound}, "log_ratios": LOG_RATIOS, "advantages": ADVANTAGES,
        })
        for name, bound in CORRECTED
    }  # fmt: skip
    return on_ranks(2, "tests.trainer.rollout_ranks", "several", base=data, calls=calls)


@pytest.mark.parametrize("correction, bound", CORRECTED)
def test_a_correction_is_in_the_weights_of_a_completion(ranks, correction, bound):
    """And in no demonstration's; the share of completions it changed is that of all ranks."""
    weights, share = CORRECTED[correction, bound]
    for rank, expected in zip(ranks, weights, strict=True):
        got, corrected_share = rank[f"{correction} {bound}"]
        assert got == pytest.approx(expected, abs=1e-5) and corrected_share == share


def test_old_log_probabilities_only_with_several_updates(ranks):
    for found in (rank["columns"] for rank in ranks):
        (columns,), nothing = found[1]
        assert columns == ("advantage", "expert", "rollout_logp") and nothing == []
        parts, apart = found[2]
        assert parts == [(*columns[:2], "old_logp", columns[2])] * 2 and len(apart) == 4 and max(apart) == 0


def test_reference_is_the_model_before_the_first_step(ranks):
    for rank in ranks:
        assert rank["reference"]["start"] == 0 and rank["reference"]["now"] > 0.01
