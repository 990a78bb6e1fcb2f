"""Answers to be judged, and what became of them."""

from megatron_plugin.rollout.rewards import RewardSample

USER = "tests.rollout.user_rewards"


def samples(*completions, reference=None, finish_reason="stop"):
    return [RewardSample("p", completion, reference, finish_reason) for completion in completions]


def causes(results):
    return [result.cause for result in results]
