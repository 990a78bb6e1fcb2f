"""From judged completions and demonstrations to samples with the columns that losses read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_plugin.data import IGNORE_INDEX, Prompt, Sample
from megatron_plugin.losses.advantages import informative
from megatron_plugin.rollout.engine import Completion
from megatron_plugin.rollout.rewards import RewardResult

__all__ = ["Group", "Judged", "expert_sample", "is_right", "rollout_samples"]


@dataclass(frozen=True)
class Judged:
    """The completions of one prompt and what each is worth."""

    prompt: Prompt
    completions: Sequence[Completion]
    texts: Sequence[str]
    results: Sequence[RewardResult]
    rewards: Sequence[float]
    """Of each completion, the punishment of its length included."""
    demonstration: float | None = None
    """Reward of the prompt's expert answer, where it joins the group (SRFT)."""

    @property
    def teaches(self) -> bool:
        """Whether rewards differ: with equal ones every advantage is 0."""
        joined = [] if self.demonstration is None else [self.demonstration]
        return bool(informative([[*self.rewards, *joined]])[0])


@dataclass(frozen=True)
class Group:
    """Judged completions with their advantages."""

    judged: Judged
    advantages: Sequence[float]
    demonstration: float = 0.0
    """Advantage of the prompt's expert answer, where it was taken into the group (SRFT)."""


def is_right(result: RewardResult) -> bool:
    """Whether the answer is right: a reward above 0, of a sum that of its first part.  Points for form or length make no answer right."""
    return next(iter(result.parts.values()), result.reward) > 0


def rollout_samples(group: Group, *, first: int, extra: bool) -> list[Sample]:
    """A sample for each completion that has a token: the prompt without, the completion with a loss.

    Columns expert, advantage, rollout_logp; with `extra` also reward (1 for a right answer, else 0) and sequence (numbers from `first` on)."""
    made, judged = [], group.judged
    for number, (completion, result, advantage) in enumerate(zip(judged.completions, judged.results, group.advantages, strict=True), first):
        if not completion.token_ids:
            continue
        prompt, length = len(judged.prompt.token_ids), len(completion.token_ids)
        tokens_T = torch.tensor([*judged.prompt.token_ids, *completion.token_ids], dtype=torch.int64)
        trained_T = torch.arange(prompt + length) >= prompt
        columns = {
            "expert": torch.zeros(prompt + length),
            "advantage": torch.where(trained_T, advantage, 0.0),
            "rollout_logp": torch.tensor([0.0] * prompt + list(completion.logprobs)),
        }
        if extra:
            columns["reward"] = torch.where(trained_T, float(is_right(result)), 0.0)
            columns["sequence"] = torch.full((prompt + length,), float(number))
        labels_T = torch.where(trained_T, tokens_T, IGNORE_INDEX)
        made.append(Sample(tokens_T, labels_T, trained_T.float(), judged.prompt.source, columns))
    return made


def expert_sample(sample: Sample, advantage: float = 0.0, *, extra: bool) -> Sample:
    """The demonstration, marked as one; with `extra`, as a right answer."""
    ones_T = torch.ones(len(sample.tokens_T))
    columns = {"expert": ones_T, "advantage": advantage * ones_T} | ({"reward": ones_T.clone()} if extra else {})
    return replace(sample, columns=columns)
