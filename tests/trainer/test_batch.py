"""Samples of completions and demonstrations: what of them every loss gets, and what only a loss without a twin."""

import pytest
import torch

from megatron_plugin.data import IGNORE_INDEX, Prompt, Sample, pack_samples
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.objective import objective_of
from megatron_plugin.rollout.engine import Completion
from megatron_plugin.rollout.rewards import RewardResult
from megatron_plugin.trainer.batch import Group, Judged, expert_sample, is_right, rollout_samples
from megatron_plugin.trainer.sources import token_inputs

PROMPT = Prompt(token_ids=(5, 6, 7), text="?", reference="#### 1", source="x.jsonl:1")


def group(*results: RewardResult) -> Group:
    completions = [
        Completion(token_ids=(8, 9)[:length], logprobs=(-0.5, -0.25)[:length], finish_reason="stop", weight_version=3)
        for length in (1 + i % 2 for i in range(len(results)))
    ]
    advantages = [1.0 - i for i in range(len(results))]
    return Group(Judged(PROMPT, completions, [""] * len(results), results, [r.reward for r in results]), advantages)


def test_prompt_is_not_trained_and_every_completion_token_has_its_columns():
    one, two = rollout_samples(group(RewardResult(1.0, "right"), RewardResult(0.0, "wrong")), first=4, extra=True)
    assert two.tokens_T.tolist() == [5, 6, 7, 8, 9] and two.labels_T.tolist() == [IGNORE_INDEX] * 3 + [8, 9]
    assert two.columns["rollout_logp"].tolist() == [0, 0, 0, -0.5, -0.25]
    assert one.columns["advantage"].tolist() == [0, 0, 0, 1] and two.columns["advantage"].tolist() == [0] * 5
    assert one.columns["reward"].tolist() == [0, 0, 0, 1] and two.columns["reward"].tolist() == [0] * 5
    assert set(one.columns["sequence"].tolist()) == {4} and set(two.columns["sequence"].tolist()) == {5}
    assert not one.columns["expert"].any()


def test_points_for_format_make_no_answer_right():
    wrong = RewardResult(0.1, "wrong", {"numeric": 0.0, "format": 1.0})
    right = RewardResult(0.9, "format", {"numeric": 1.0, "format": -1.0})
    assert not is_right(wrong) and is_right(right) and is_right(RewardResult(0.5, "scored")) and not is_right(RewardResult(-1.0, "scored"))
    samples = rollout_samples(group(wrong, right), first=0, extra=True)
    assert [float(s.columns["reward"][-1]) for s in samples] == [0.0, 1.0]


def test_grpo_keeps_its_kernel_twin_in_on_policy_steps():
    pytest.importorskip("triton")
    loss = bind("grpo")
    samples = rollout_samples(group(RewardResult(1.0, "right"), RewardResult(0.0, "wrong")), first=0, extra=loss.twin is None)
    batch = pack_samples(samples, 16, pad_id=0).batch([0])
    inputs = token_inputs(batch, (batch.labels != IGNORE_INDEX).float()).map(torch.flatten)
    assert objective_of(loss, inputs)[0].twin is not None


SAMPLE = Sample(torch.tensor([5, 8]), torch.tensor([IGNORE_INDEX, 8]), torch.ones(2), "x.jsonl:1", {})


def test_demonstration_is_an_expert_and_right():
    sample = expert_sample(SAMPLE, 0.5, extra=True)
    assert sample.columns["expert"].all() and sample.columns["reward"].all() and sample.columns["advantage"].tolist() == [0.5, 0.5]
    assert set(expert_sample(SAMPLE, extra=False).columns) == {"expert", "advantage"}
