"""From completions to rewards and advantages.  Rewards are given on leaders, where the completions arrive."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_plugin.config import as_config_error
from megatron_plugin.data import Prompt
from megatron_plugin.losses.advantages import augmented_advantages, group_advantages, overlong_penalty, reward_sums
from megatron_plugin.rollout.engine import Completion
from megatron_plugin.rollout.log import RolloutLine
from megatron_plugin.rollout.rewards import RewardResult, RewardSample, make_reward
from megatron_plugin.trainer.batch import Group, Judged
from megatron_plugin.trainer.leaders import Leaders
from megatron_plugin.trainer.run import Run

__all__ = ["Judge"]


ByReplica = dict[int, list[Judged]]


class Judge:
    """The reward and what follows from it.  Functions of a ByReplica are called by every rank; it is empty but on leaders."""

    def __init__(self, run: Run, leaders: Leaders):
        self.config, self.leaders, self.tokenizer = run.config.rollout, leaders, run.data.tokenizer
        self.joins_demonstrations = run.config.role.demonstrations
        self.over_answers = run.loss.params.get("preset") == "code"  # SRFT's released code: mean and deviation of the answers alone
        self.seconds = 0.0
        """Spent in `judge` since whoever reports it set this to 0."""
        self.wanted = self.config.prompts // leaders.replicas
        with as_config_error("rollout.reward", run.config.sources.get("rollout.reward")):
            self.reward = leaders.on_leaders(lambda: make_reward(self.config.reward, timeout_s=self.config.reward_timeout_s, network=self.config.reward_network))

    def judge(self, found: Sequence[tuple[Prompt, Sequence[Completion]]]) -> list[Judged]:
        """Leaders only: every completion of these prompts."""
        begin = time.perf_counter()
        texts = [[self.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions] for _, completions in found]
        samples = [
            RewardSample(prompt.text, text, prompt.reference, completion.finish_reason)
            for (prompt, completions), own in zip(found, texts, strict=True)
            for completion, text in zip(completions, own, strict=True)
        ]
        shown = [prompt for prompt, _ in found] if self.joins_demonstrations else []
        samples += [RewardSample(prompt.text, prompt.reference, prompt.reference) for prompt in shown]  # on the answers' scale
        results = self.reward(samples)
        answers, demos = iter(results), results[len(results) - len(shown) :]
        judged = [self._judged(prompt, completions, own, [next(answers) for _ in own]) for (prompt, completions), own in zip(found, texts, strict=True)]
        self.seconds += time.perf_counter() - begin
        return [replace(j, demonstration=demo.reward) for j, demo in zip(judged, demos, strict=True)] if shown else judged

    def _judged(self, prompt: Prompt, completions: Sequence[Completion], texts: Sequence[str], results: Sequence[RewardResult]) -> Judged:
        config = self.config
        punished = overlong_penalty(
            [len(c.token_ids) for c in completions], max_tokens=config.max_tokens, buffer=config.overlong_buffer, factor=config.overlong_penalty
        )
        rewards = [result.reward + float(extra) for result, extra in zip(results, punished, strict=True)]
        return Judged(prompt, completions, texts, results, rewards)

    def short_of(self, judged: ByReplica) -> int:
        """Groups that this leader's replicas lack for steps in which every group teaches."""
        return sum(max(0, self.wanted - sum(j.teaches for j in own)) for own in judged.values())

    def informative_first(self, judged: ByReplica, more: ByReplica) -> tuple[ByReplica, list[Judged]]:
        """As many groups for each replica as a step takes, of these and `more`: those that teach, in order, then the others; and what is left over."""
        chosen, left_out = {}, []
        for replica, own in judged.items():
            both = sorted(own + more.get(replica, []), key=lambda j: not j.teaches)
            chosen[replica] = both[: self.wanted]
            left_out += both[self.wanted :]
        return chosen, left_out

    def groups(self, judged: ByReplica) -> tuple[dict[int, list[Group]], dict[str, float]]:
        """(groups with advantages by replica, on leaders; metrics of the whole batch, on every rank)."""
        mine = self.leaders.on_leaders(lambda: reward_sums([j.rewards for own in judged.values() for j in own]))
        sums = sum(x for x in self.leaders.everyone(mine) if x is not None)
        groups = self.leaders.on_leaders(lambda: {replica: self._with_advantages(own, sums) for replica, own in judged.items()}) or {}
        return groups, self._metrics(judged)

    def _with_advantages(self, judged: Sequence[Judged], sums: torch.Tensor) -> list[Group]:
        rewards = [j.rewards for j in judged]
        if self.joins_demonstrations:
            advantages, of_demos = augmented_advantages(rewards, [[j.demonstration] for j in judged], over_answers=self.over_answers)
            demos = [float(a) for a in of_demos]
        else:
            advantages, demos = group_advantages(rewards, scale=self.config.advantage_scale, sums=sums), [0.0] * len(rewards)
        return [Group(j, a.tolist(), demo) for j, a, demo in zip(judged, advantages, demos, strict=True)]

    def mean_reward(self, judged: ByReplica, unanswered: int) -> float:
        """Over all completions and `unanswered` ones worth 0, without the punishment of length; the same on every rank."""
        rewards = [result.reward for own in judged.values() for j in own for result in j.results]
        said = self.leaders.everyone((sum(rewards), len(rewards)))
        return sum(total for total, _ in said) / max(1, unanswered + sum(count for _, count in said))

    def _metrics(self, judged: ByReplica) -> dict[str, float]:
        counts: Counter[str] = Counter()
        for j in (j for own in judged.values() for j in own):
            counts["groups"] += 1
            counts["zero_groups"] += not j.teaches
            for completion, result in zip(j.completions, j.results, strict=True):
                counts["samples"] += 1
                counts["tokens"] += len(completion.token_ids)
                counts["truncated"] += completion.finish_reason == "length"
                counts["rewards"] += result.reward
                counts["failures"] += result.cause in ("timeout", "memory", "crash", "error", "no reference")
                counts["empty"] += not completion.token_ids or result.cause == "empty"
        total = self.leaders.added(counts)
        samples, groups = max(1, total["samples"]), max(1, total["groups"])
        return {
            "rollout/reward_mean": total["rewards"] / samples, "rollout/len_mean": total["tokens"] / samples,
            "rollout/truncated_frac": total["truncated"] / samples, "rollout/zero_groups": total["zero_groups"] / groups,
            "rollout/samples": float(total["samples"]), "rollout/reward_failures": float(total["failures"]), "rollout/empty": float(total["empty"]),
        }  # fmt: skip

    def lines(self, groups: dict[int, list[Group]], left_out: Sequence[Judged], *, step: int) -> list[RolloutLine]:
        """For rollouts.jsonl: what is trained on, then what dynamic sampling left out, which has no advantage."""
        trained = [(group.judged, group.advantages) for own in groups.values() for group in own]
        return [
            RolloutLine(
                step=step, source=judged.prompt.source, prompt=judged.prompt.text, completion=text, tokens=len(completion.token_ids),
                reward=result.reward, cause=result.cause, advantage=advantage, finish_reason=completion.finish_reason,
                weight_version=completion.weight_version,
            )
            for judged, advantages in [*trained, *((other, [math.nan] * len(other.texts)) for other in left_out)]
            for completion, text, result, advantage in zip(judged.completions, judged.texts, judged.results, advantages, strict=True)
        ]  # fmt: skip

    def close(self) -> None:
        if self.reward is not None:
            self.reward.close()
