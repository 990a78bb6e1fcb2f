"""Demonstrations and rollouts in one run: the loop of studies b and d.  P prompts, GROUP answers to each.

A run has `sft_first` supervised steps, then `steps` mixed ones.  Every mixed step draws its rollouts from the current model and makes one update, so the
ratio is 1 (strictly on-policy, as CHORD has it).  SRFT answers the questions of its demonstrations (200 additions); the others answer new additions and
subtractions in every step.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.dynamics.base import STEPS, base, held_out
from benchmarks.dynamics.columns import VOCABULARY, Style, draw_problems, expert_style
from benchmarks.dynamics.learn import GROUP, Demo, Part, Trainer, demonstrations, evaluate, expert_statistics, passes, rollouts
from benchmarks.dynamics.model import Size, TinyLlama
from benchmarks.dynamics.study import Record
from megatron_plugin import TokenLoss, bind
from megatron_plugin.losses.advantages import augmented_advantages

__all__ = ["MixedSettings", "SAMPLINGS", "TINY", "Way", "learn", "untouched"]

SAMPLINGS = 12
"""Of the base model, whose reward everything else is measured from: one sampling of 200 answers has a standard deviation of 0.03."""


@dataclass(frozen=True)
class MixedSettings:
    filler: float = 0.1
    demos: int = 200
    prompts: int = 12
    expert_batch: int = 32
    sft_batch: int = 32
    sft_first: int = 16
    """Supervised steps of the arm that does SFT before RL."""
    steps: int = 32
    sft_alone: int = 192
    """Steps of the arm that does nothing else."""
    decay: int = 16
    mu_peak: float = 0.5
    mu_valley: float = 0.02
    mu_phi: float = 0.5
    lr: float = 2e-4
    sft_lr: float = 5e-4
    """Of the arm that does nothing else: it is to overfit."""
    warm_up: int = 5
    evaluated: int = 200
    every: int = 8
    base_steps: int = STEPS
    size: Size | None = None


TINY = MixedSettings(
    demos=8, prompts=2, expert_batch=2, sft_batch=2, sft_first=1, steps=2, sft_alone=2, decay=1, evaluated=4, every=1, base_steps=2,
    size=Size(VOCABULARY, width=16, layers=1, heads=2, inner=32),
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How an arm learns."""

    loss: TokenLoss | None
    """Of the mixed steps; None: supervised steps only."""
    mu: Callable[[int], float] = lambda step: 0.0
    """Share of demonstrations in a mixed step; that of rollouts is 1 - mu."""
    supervised: int = 0
    """Steps of SFT before."""
    mixed: int = 0
    same_questions: bool = False
    """SRFT: both shares are 1, and a demonstration joins the group of the answers to its question."""
    lr: float = 2e-4


@dataclass
class Run:
    """One arm of one seed."""

    model: TinyLlama
    seed: int
    settings: MixedSettings
    demos: list[Demo] = field(init=False)
    held: Part = field(init=False)
    curve: dict[str, list] = field(init=False)

    def __post_init__(self):
        s = self.settings
        rng, style = random.Random(f"mixed {self.seed}"), expert_style(s.filler)
        self.demos = solved(s.demos, style, rng)
        self.plus, self.minus = held_out("+")[: s.evaluated], held_out("-")[: s.evaluated]
        self.held = demonstrations([(problem, problem.solved(style, rng)) for problem in self.plus])
        self.curve = {name: [] for name in ("reward", "entropy", "length", "letters", "nll")}

    def note(self, step: int) -> None:
        seen = evaluate(self.model, self.plus, seed=step)
        nll = -float(expert_statistics(self.model, self.held)[0].mean())
        for name, value in zip(self.curve, (seen.right, seen.entropy, seen.length, seen.letters, nll), strict=True):
            self.curve[name].append([step, value])

    def end(self) -> dict[str, float]:
        return {
            "reward": evaluate(self.model, self.plus, seed=1).right, "greedy": evaluate(self.model, self.plus, seed=None).right,
            "minus": evaluate(self.model, self.minus, seed=1).right,
            "entropy": self.curve["entropy"][-1][1], "length": self.curve["length"][-1][1], "letters": self.curve["letters"][-1][1],
            "nll": self.curve["nll"][-1][1],
        }  # fmt: skip


def solved(count: int, style: Style, rng: random.Random) -> list[Demo]:
    return [(problem, problem.solved(style, rng)) for problem in draw_problems(count, "+", rng)]


def learn(way: Way, seed: int, settings: MixedSettings, runs: Path) -> Record:
    """The record of one arm."""
    run = Run(base(seed, settings.base_steps, runs=runs, size=settings.size), seed, settings)
    rng, generator = random.Random(f"rollouts {seed}"), torch.Generator().manual_seed(seed)
    trainer, sft = Trainer(run.model, way.lr), bind("sft")
    batches, few = passes(run.demos, settings.sft_batch, random.Random(seed)), passes(run.demos, settings.expert_batch, random.Random(seed))
    run.note(0)
    last = way.supervised + way.mixed
    for step in range(1, last + 1):
        factor = min(1.0, step / settings.warm_up)
        if step <= way.supervised:
            trainer.step([demonstrations(next(batches))], sft, lr_factor=factor)
        else:
            mu = way.mu(step - way.supervised - 1)
            parts = srft_parts(run, generator, rng) if way.same_questions else chord_parts(run, mu, few, generator, rng)
            trainer.step(parts, way.loss, lr_factor=factor)
        if step == last or step % (settings.every * (2 if way.mixed == 0 else 1)) == 0:
            run.note(step)
    return {"end": run.end(), "curve": run.curve}


def untouched(seed: int, settings: MixedSettings, runs: Path) -> Record:
    """The base model's record: its reward is the mean of SAMPLINGS samplings, none of which any curve shares."""
    run = Run(base(seed, settings.base_steps, runs=runs, size=settings.size), seed, settings)
    rewards = [evaluate(run.model, run.plus, seed=1000 + i).right for i in range(SAMPLINGS)]
    greedy, minus = evaluate(run.model, run.plus, seed=None).right, evaluate(run.model, run.minus, seed=1).right
    return {"end": {"reward": statistics.mean(rewards), "greedy": greedy, "minus": minus}, "curve": {}, "samplings": rewards}


def chord_parts(run: Run, mu: float, few: Iterator[list[Demo]], generator: torch.Generator, rng: random.Random) -> list[Part]:
    own = rollouts(run.model, draw_problems(run.settings.prompts, "+-", rng), generator).part(1 - mu)
    return [own, demonstrations(next(few), share=mu)] if mu else [own]


def srft_parts(run: Run, generator: torch.Generator, rng: random.Random) -> list[Part]:
    """Rollouts and demonstrations of the same questions."""
    chosen = rng.sample(run.demos, run.settings.prompts)
    own = rollouts(run.model, [problem for problem, _ in chosen], generator)
    _, of_demo = augmented_advantages(own.reward, torch.ones(len(chosen), 1))
    assert own.reward.shape == (len(chosen), GROUP)
    return [own.part(1.0, demo_reward=1.0), demonstrations(chosen, share=1.0, advantage=torch.cat(of_demo))]
