"""One training step, by the project's public losses, and what is measured of a model.  B rows, T positions, N tokens of an answer.

A step is made of parts: demonstrations and rollouts, each with its share of the objective.  All parts go through one forward and one `token_loss`, with
the share and the number of tokens of the part in the coefficient, as the trainer does it: (1 - mu) / Z_rollout and mu / N_expert.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.dynamics.columns import END, LONGEST, PAD, PROMPT, Problem, is_right, letters
from benchmarks.dynamics.model import Drawn, TinyLlama, draw
from megatron_plugin import LossOutput, TokenInputs, TokenLoss, token_loss, token_stats
from megatron_plugin.losses.advantages import augmented_advantages, group_advantages

__all__ = ["Evaluation", "Part", "Rollouts", "Trainer", "answer", "demonstrations", "evaluate", "expert_statistics", "passes", "rollouts"]

Demo = tuple[Problem, list[int]]
GROUP = 8


@dataclass(frozen=True)
class Part:
    """Rows of one source."""

    ids: Tensor
    """[B, T] int64: prompt, answer, PAD."""
    share: float = 1.0
    """Of the objective: mu, 1 - mu."""
    expert: bool = True
    advantage: Tensor | None = None
    """[B]."""
    reward: Tensor | None = None
    """[B]."""
    prompt: int = PROMPT
    """Tokens in front of the answer."""

    @property
    def trained(self) -> Tensor:
        """[B, T - 1] bool: positions whose next token is one of the answer."""
        position_T = torch.arange(1, self.ids.shape[1])
        return (position_T >= self.prompt) & (self.ids[:, 1:] != PAD)


def demonstrations(demos: Sequence[Demo], **fields) -> Part:
    rows = [[*problem.prompt, *solution] for problem, solution in demos]
    longest = max(map(len, rows))
    return Part(torch.tensor([row + [PAD] * (longest - len(row)) for row in rows]), **fields)


def joined(parts: Sequence[Part]) -> tuple[Tensor, Tensor, TokenInputs]:
    """ids [B, T], labels [B, T - 1] with -100 where nothing is trained, and the losses' inputs of labels' shape."""
    longest = max(part.ids.shape[1] for part in parts)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("ids", "trained", "coefficient", "expert", "advantage", "reward")}
    for part in parts:
        ids = torch.nn.functional.pad(part.ids, (0, longest - part.ids.shape[1]), value=PAD)
        trained = torch.nn.functional.pad(part.trained, (0, longest - part.ids.shape[1]))
        zeros = torch.zeros(len(ids))
        values = {
            "ids": ids, "trained": trained, "coefficient": trained * (part.share / trained.sum()), "expert": torch.full_like(trained, part.expert),
            "advantage": (zeros if part.advantage is None else part.advantage.float())[:, None].expand(trained.shape),
            "reward": (zeros if part.reward is None else part.reward.float())[:, None].expand(trained.shape),
        }  # fmt: skip
        for name, value in values.items():
            columns[name].append(value)
    made = {name: torch.cat(values) for name, values in columns.items()}
    labels = made["ids"][:, 1:].masked_fill(~made["trained"], -100)
    inputs = TokenInputs(
        coefficient=made["coefficient"], expert=made["expert"], advantage=made["advantage"], extra={"reward": made["reward"]}
    )
    return made["ids"], labels, inputs


@dataclass
class Trainer:
    """AdamW as the papers' trainers have it: betas (0.9, 0.95), weight decay 0.01, gradient clipped at 1."""

    model: TinyLlama
    lr: float
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def step(self, parts: Sequence[Part], loss: TokenLoss, *, lr_factor: float = 1.0) -> LossOutput:
        """One update.  Parts without a share are left out, their forward too."""
        ids, labels, inputs = joined([part for part in parts if part.share])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        out = token_loss(self.model(ids[:, :-1]), labels, loss, inputs=inputs)
        self.optimizer.zero_grad(set_to_none=True)
        out.loss_sum.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return out


def passes(demos: Sequence[Demo], size: int, rng: random.Random) -> Iterator[list[Demo]]:
    """Batches without end: every demonstration once before any comes again."""
    waiting: list[Demo] = []
    while True:
        while len(waiting) < size:
            waiting += rng.sample(list(demos), len(demos))
        yield waiting[:size]
        waiting = waiting[size:]


def answer(model: TinyLlama, problems: Sequence[Problem], generator: torch.Generator | None) -> Drawn:
    """One answer to each: sampled at temperature 1, greedy without a generator."""

    def choose(logits: list[Tensor], _: Tensor) -> Tensor:
        if generator is None:
            return logits[0].argmax(-1)
        return torch.multinomial(logits[0].softmax(-1), 1, generator=generator)[:, 0]

    return draw(model, [torch.tensor([problem.prompt for problem in problems])], LONGEST, choose, end=END, pad=PAD)


class Rollouts(NamedTuple):
    ids: Tensor
    """[P x GROUP, T]."""
    reward: Tensor
    """[P, GROUP], 1 where the answer is right."""
    drawn: Drawn

    def part(self, share: float, *, demo_reward: float | None = None) -> Part:
        """The answers as a part; with demo_reward each group's advantage is that of the group and one demonstration (SRFT)."""
        if demo_reward is None:
            advantage_PG = group_advantages(self.reward)
        else:
            own, _ = augmented_advantages(self.reward, torch.full((len(self.reward), 1), demo_reward))
            advantage_PG = torch.stack(own)
        return Part(self.ids, share, expert=False, advantage=advantage_PG.reshape(-1), reward=self.reward.reshape(-1))


def rollouts(model: TinyLlama, problems: Sequence[Problem], generator: torch.Generator) -> Rollouts:
    """GROUP answers to each problem."""
    repeated = [problem for problem in problems for _ in range(GROUP)]
    drawn = answer(model, repeated, generator)
    prompts = torch.tensor([problem.prompt for problem in repeated])
    return Rollouts(torch.cat([prompts, drawn.tokens], 1), is_right(drawn.tokens, repeated).double().view(-1, GROUP), drawn)


class Evaluation(NamedTuple):
    right: float
    """Share of right answers."""
    entropy: float
    """Nats, mean over the tokens of the answers."""
    length: float
    """Tokens of an answer."""
    letters: float
    """Share of tokens that are the expert's letters."""


def evaluate(model: TinyLlama, problems: Sequence[Problem], *, seed: int | None) -> Evaluation:
    """One answer to each problem: sampled with a generator of that seed, greedy for None."""
    drawn = answer(model, problems, None if seed is None else torch.Generator().manual_seed(seed))
    lives = drawn.tokens != PAD
    right = float(is_right(drawn.tokens, problems).float().mean())
    return Evaluation(right, drawn.entropy, float(lives.sum(1).float().mean()), float(letters(drawn.tokens).sum() / lives.sum()))


@torch.no_grad()
def expert_statistics(model: TinyLlama, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, label) of every trained token, [tokens] each."""
    labels = part.ids[:, 1:].masked_fill(~part.trained, -100)
    stats = token_stats(model(part.ids[:, :-1]), labels)
    return stats.logp[part.trained], stats.entropy[part.trained], labels[part.trained]
