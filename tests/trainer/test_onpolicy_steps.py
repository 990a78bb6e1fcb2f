"""Optimizer steps of the on-policy trainer: which samples each has, when nothing is asked of engines, and steps without a trained token."""

import math

import pytest

from tests.spawn import on_ranks
from tests.trainer.rollout_ranks import write_questions

RANKS = "tests.trainer.policy_ranks"
CHORD = {"loss.name": "chord", "data.expert_samples": 4}
ALL = [f"q{i}" for i in range(16)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("questions")
    return {f"data.{key}": write_questions(folder, key, 16) for key in ("train", "prompts", "eval")} | {"run_dir": folder / "run"}


def steps(data, tmp_path, count: int, **overrides) -> dict:
    return on_ranks(1, RANKS, "steps", overrides=data | {"run_dir": tmp_path / "run"} | overrides, count=count)[0]


def test_each_update_of_a_batch_has_the_experts_of_its_own_mu(data, tmp_path):
    """mu is 0 in the first of four steps, which are two rollout batches."""
    schedule = {"mu.warmup_steps": 1, "mu.decay_steps": 0, "mu.peak": 0.5, "mu.valley": 0.5}
    found = steps(data, tmp_path, 4, **CHORD, **schedule, **{"rollout.updates": 2})
    assert found["raised"] == [("", "")] * 4 and found["asked"] == 8
    assert [(pending.count(False), pending.count(True)) for pending in found["pending"]] == [(4, 0), (4, 4), (4, 4), (4, 4)]
    assert [means["mu"] for means in found["means"]] == [0, 0.5, 0.5, 0.5]
    assert [means["expert_tokens"] > 0 for means in found["means"]] == [False, True, True, True]
    ratios = [means["ratio_mean"] for means in found["means"]]
    assert ratios[0] == ratios[2] == 1 and ratios[1] != 1 != ratios[3], "clipped against the policy before the first of a batch's updates"


@pytest.mark.parametrize("option", ["loss.tis=2", "loss.kl=0.1", "loss.icepop_high=2"])
def test_with_mu_1_engines_are_asked_for_nothing(data, tmp_path, option):
    """The loss's columns of rollouts do not exist then, and experts need none."""
    name, _, value = option.partition("=")
    found = steps(data, tmp_path, 2, **CHORD, **{"mu.peak": 1, "mu.valley": 1, name: value})
    assert found["raised"] == [("", "")] * 2 and found["asked"] == 0 and found["prompts"] == 0
    assert found["pending"] == [[True] * 4] * 2
    for means in found["means"]:
        assert means["rollout_tokens"] == 0 and means["mu"] == 1 and math.isfinite(means["lm loss"]) and means["grad_norm"] > 0


@pytest.fixture(scope="module")
def refused(data) -> list[dict]:
    """A step of two leaders whose engines refuse everything, one where the second's do, and ones where the second's answers cannot be trained on."""
    calls = {
        name: (f"{RANKS}:steps", {"count": 1, "faults": {fake: dict.fromkeys(ALL, "refuse") for fake in fakes}})
        for name, fakes in (("both", ["fake0", "fake1"]), ("second", ["fake1"]))
    }
    calls |= {fault: (f"{RANKS}:steps", {"count": 1, "faults": {"fake1": {f"q{i}": fault for i in range(16)}}}) for fault in ("padding", "stray")}
    return on_ranks(2, "tests.trainer.rollout_ranks", "several", base=data | {"rollout.engines": 2}, calls=calls)


def test_a_step_without_a_trained_token_ends_every_rank(refused):
    for rank in refused:
        (kind, said), = rank["both"]["raised"]
        assert kind == "EmptyStepError" and "no token of the step is trained" in said and said.endswith("(exit 5)") and not rank["both"]["means"]


def test_a_rank_without_a_completion_takes_part_in_the_step(refused):
    first, second = (rank["second"] for rank in refused)
    assert first["pending"] == [[False] * 4] and second["pending"] == [[]]
    assert first["raised"] == second["raised"] == [("", "")] and first["means"][0]["lm loss"] == second["means"][0]["lm loss"]


def test_an_answer_with_padding_of_the_vocabulary_is_refused(refused):
    """The engine is told the tokenizer's size."""
    first, second = (rank["padding"] for rank in refused)
    assert first["raised"] == second["raised"] == [("", "")] and [first["pending"], second["pending"]] == [[[False] * 4], [[]]]


def test_a_label_beyond_the_vocabulary_ends_every_rank(refused):
    """At once: the other one does not wait for it where rows are shared out."""
    (told,), (own,) = (rank["stray"]["raised"] for rank in refused)
    assert own[0] == "DataError" and "got label" in own[1] and own[1].endswith("(exit 4)") and told == ("RemoteError", f"DataError: {own[1]}")


def test_the_position_of_supervised_training_is_refused_before_an_engine_is_started(data, tmp_path):
    (kind, said), started = on_ranks(1, RANKS, "resumes_supervised", overrides=data | {"run_dir": tmp_path / "run"})[0]
    assert kind == "DataError" and "the checkpoint is of supervised training" in said and said.endswith("(exit 4)") and started == 0


def test_a_signal_between_the_updates_of_a_batch_says_what_is_left_out(data, tmp_path):
    before, after = on_ranks(1, RANKS, "between_updates", overrides=data | {"run_dir": tmp_path / "run"})[0]
    assert before == [] and len(after) == 1 and "step 1 is saved between the updates of a rollout batch: the 1 that are left of rollout.updates=2" in after[0]
