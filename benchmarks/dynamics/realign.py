"""e. Hinted decoding and IDFT: how on-distribution the expert's data are before and after realignment, and what a model makes of each (arXiv 2602.12222).

    python -m benchmarks.dynamics.realign

The base model learns, for 120 more steps, to answer a question with the reference result in front of it (the hint), too: it then works in the expert's
long style, and slips into half as many letters.  Without a hint it answers as before.  500 questions with the expert's answers become four sets:
    expert      the expert's answers
    realigned   the paper's pipeline: its own sampled answer where that is right, else hinted decoding (beta 3), kept where right
    hint        hinted decoding with beta 0, the hint alone, kept where right
    own         its own sampled answer where right, no hint: rejection sampling, the control
The mixing is megatron_plugin/rollout/hinted/mixing.py; from the ':' on the plain stream alone is drawn from, as from the boxed answer in the paper.
cll = log p + H under the model without hint, mean over the tokens of a set, nats; 0 for the model's own samples.

Rule, over seeds; accuracies are of one sampled answer to each of 200 held-out additions, after 60 steps on the set:
    on distribution   cll of realigned - of expert;  of hinted decoding with beta 3 - with beta 0, over the same questions
    accuracy          SFT on realigned - SFT on expert;  IDFT on realigned - IDFT on expert
    IDFT              IDFT - SFT on expert;  IDFT - SFT on realigned
    the hint          SFT on realigned - SFT on own;  SFT on realigned - SFT on hint
Control: `start`, not trained on any set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.dynamics.base import STEPS, base, held_out, keep
from benchmarks.dynamics.columns import (
    ANSWER,
    BASE,
    DIGITS,
    END,
    HINT,
    LONGEST,
    PAD,
    PROMPT,
    VOCABULARY,
    Problem,
    draw_problems,
    expert_style,
    is_right,
)
from benchmarks.dynamics.draw import plot_curves
from benchmarks.dynamics.learn import Demo, Part, Trainer, answer, demonstrations, evaluate, expert_statistics, passes
from benchmarks.dynamics.model import Drawn, Size, TinyLlama, draw
from benchmarks.dynamics.study import Claim, Found, Record, Study, main
from megatron_plugin import bind
from megatron_plugin.rollout.hinted.mixing import Phase, mix
from megatron_plugin.rollout.hinted.options import HintedOptions

SETS, LOSSES = ("expert", "realigned", "hint", "own"), ("sft", "idft")
ARMS = ("start", "expert_sft", "expert_idft", "realigned_sft", "realigned_idft", "hint_sft", "own_sft")
SEEN = 1 + (DIGITS + 1) + PROMPT
"""Tokens in front of an answer that comes after a hint: the token HINT, the digits of the result, the question."""


@dataclass(frozen=True)
class Settings:
    filler: float = 0.3
    demos: int = 500
    hint_steps: int = 120
    hint_batch: int = 48
    """Rows with a hint in a step; as many without."""
    hint_lr: float = 1e-3
    slips: float = 0.5
    """Letters in an answer behind a hint, as a share of the expert's."""
    beta: float = 3.0
    temperature: float = 0.3
    steps: int = 60
    batch: int = 64
    lr: float = 2e-4
    warm_up: int = 10
    evaluated: int = 200
    every: int = 20
    base_steps: int = STEPS
    size: Size | None = None


SETTINGS = Settings()
TINY = Settings(
    demos=6, hint_steps=2, hint_batch=2, steps=2, batch=2, warm_up=1, evaluated=4, every=1, base_steps=2,
    size=Size(VOCABULARY, width=16, layers=1, heads=2, inner=32),
)  # fmt: skip


def behind_hint(problem: Problem) -> list[int]:
    return [HINT, *problem.result, *problem.prompt]


def hinted_part(demos: Sequence[Demo], share: float) -> Part:
    rows = [[*behind_hint(problem), *solution, *[PAD] * (LONGEST - len(solution))] for problem, solution in demos]
    return Part(torch.tensor(rows), share, prompt=SEEN)


def hinted_model(seed: int, s: Settings, runs: Path) -> TinyLlama:
    """The base model after it has learnt to take a hint; kept beside it."""
    path = runs / "base" / f"seed{seed}-{s.base_steps}-hinted-{s.hint_steps}.pt"
    model = base(seed, s.base_steps, runs=runs, size=s.size)
    if not path.exists():
        rng, trainer, sft, style = random.Random(f"hint {seed}"), Trainer(model, s.hint_lr), bind("sft"), expert_style(s.filler * s.slips)
        for step in range(1, s.hint_steps + 1):
            shown, plain = (draw_problems(s.hint_batch, "+", rng), draw_problems(s.hint_batch, "+-", rng))
            parts = [hinted_part([(p, p.solved(style, rng)) for p in shown], 0.5), demonstrations([(p, p.solved(BASE, rng)) for p in plain], share=0.5)]
            trainer.step(parts, sft, lr_factor=min(1.0, step / s.warm_up))
        keep(model, path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def decode_hinted(model: TinyLlama, demos: Sequence[Demo], s: Settings, beta: float, generator: torch.Generator) -> Drawn:
    """One answer to each question with its result as the hint."""
    options = HintedOptions(vocab_size=VOCABULARY, end_ids=(END,), beta=beta, temperature=s.temperature, splitter="", max_tokens=LONGEST)
    phases = [Phase.FIRST] * len(demos)

    def choose(logits: list[Tensor], _: Tensor) -> Tensor:
        tokens = torch.multinomial((mix(logits[0], logits[1], phases, options) / options.temperature).softmax(-1), 1, generator=generator)[:, 0]
        for row, token in enumerate(tokens.tolist()):
            phases[row] = Phase.PLAIN if phases[row] is Phase.PLAIN or token == ANSWER else Phase.MIXED
        return tokens

    prompts = [torch.tensor([behind_hint(problem) for problem, _ in demos]), torch.tensor([problem.prompt for problem, _ in demos])]
    return draw(model, prompts, LONGEST, choose, end=END, pad=PAD)


def kept(demos: Sequence[Demo], drawn: Drawn) -> dict[int, Demo]:
    """Right answers by the number of their question."""
    right = is_right(drawn.tokens, [problem for problem, _ in demos]).tolist()
    rows = [[token for token in row if token != PAD] for row in drawn.tokens.tolist()]
    return {i: (problem, rows[i]) for i, (problem, _) in enumerate(demos) if right[i]}


@lru_cache(maxsize=1)
def make_sets(seed: int, s: Settings, runs: Path) -> tuple[dict[str, list[Demo]], dict[str, float]]:
    """The four sets, and their facts: cll, share of questions kept."""
    model = hinted_model(seed, s, runs)
    rng, generator = random.Random(f"realign {seed}"), torch.Generator().manual_seed(seed)
    style = expert_style(s.filler)
    expert = [(problem, problem.solved(style, rng)) for problem in draw_problems(s.demos, "+", rng)]
    own = kept(expert, answer(model, [problem for problem, _ in expert], generator))
    alone, mixed = (kept(expert, decode_hinted(model, expert, s, beta, generator)) for beta in (0.0, s.beta))
    realigned = {i: demo for i, demo in mixed.items() if i not in own} | own
    sets = {"expert": expert, "realigned": list(realigned.values()), "hint": list(alone.values()), "own": list(own.values())}
    both = sorted(alone.keys() & mixed.keys())
    measured = {**sets, "beta_0": [alone[i] for i in both], "beta_3": [mixed[i] for i in both]}
    facts = {f"cll_{name}": mean_cll(model, demos) for name, demos in measured.items() if demos}
    facts |= {f"kept_{name}": len(found) / len(expert) for name, found in (("own", own), ("beta_0", alone), ("beta_3", mixed), ("realigned", realigned))}
    return sets, facts


def mean_cll(model: TinyLlama, demos: Sequence[Demo]) -> float:
    logp, entropy, _ = expert_statistics(model, demonstrations(demos))
    return float((logp + entropy).mean())


def run(arm: str, seed: int, s: Settings, runs: Path) -> Record:
    model = hinted_model(seed, s, runs)
    sets, facts = make_sets(seed, s, runs)
    plus, minus, curve = held_out("+")[: s.evaluated], held_out("-")[: s.evaluated], []
    curve.append([0, evaluate(model, plus, seed=0).right])
    chosen, _, loss = arm.partition("_")
    if demos := sets.get(chosen):
        trainer, bound, batches = Trainer(model, s.lr), bind(loss), passes(demos, s.batch, random.Random(seed))
        for step in range(1, s.steps + 1):
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / s.steps))
            trainer.step([demonstrations(next(batches))], bound, lr_factor=cosine * min(1.0, step / s.warm_up))
            if step % s.every == 0:
                curve.append([step, evaluate(model, plus, seed=step).right])
    sampled = evaluate(model, plus, seed=1)
    end = {
        "id": sampled.right, "id_greedy": evaluate(model, plus, seed=None).right, "ood": evaluate(model, minus, seed=1).right,
        "entropy": sampled.entropy, "letters": sampled.letters, "samples": len(sets.get(chosen, ())),
    }  # fmt: skip
    end |= {"cll": facts[f"cll_{chosen}"]} if f"cll_{chosen}" in facts else {}
    return {"end": end, "curve": {"accuracy": curve}, "facts": facts}


def claims(found: Found) -> list[Claim]:
    def facts(a: str, b: str) -> list[float]:
        pairs = [[record["facts"].get(f"cll_{name}", math.nan) for name in (a, b)] for record in found["start"]]
        return [x - y for x, y in pairs]

    def accuracy(a: str, b: str) -> list[float]:
        return [x["end"]["id"] - y["end"]["id"] for x, y in zip(found[a], found[b], strict=True)]

    pairs = {
        "SFT learns more from realigned data": ("realigned_sft", "expert_sft"), "IDFT learns more from realigned data": ("realigned_idft", "expert_idft"),
        "IDFT is better than SFT on the expert's data": ("expert_idft", "expert_sft"),
        "IDFT is better than SFT on realigned data": ("realigned_idft", "realigned_sft"),
        "the hint adds to rejection sampling": ("realigned_sft", "own_sft"), "mixing adds to the hint alone": ("realigned_sft", "hint_sft"),
    }  # fmt: skip
    return [
        Claim("realigned data are nearer to the model", "cll, realigned - expert", facts("realigned", "expert")),
        Claim("mixing brings hinted answers nearer to the model", "cll over the same questions, beta 3 - beta 0", facts("beta_3", "beta_0")),
        *(Claim(statement, f"held-out accuracy, {a} - {b}", accuracy(a, b)) for statement, (a, b) in pairs.items()),
    ]


def figure(canvas, found: Found) -> None:
    accuracy, cll, shares = canvas.subplots(1, 3)
    plot_curves(accuracy, found, "accuracy", unit="share right, one sample each", title="held-out accuracy")
    records = found["start"]
    units = (("cll_", "nats a token", "mean cll of a set; a point for each seed"), ("kept_", "share of the questions", "questions answered right; a point for each seed"))
    for axis, (prefix, unit, title) in zip((cll, shares), units, strict=True):
        names = [name for name in records[0]["facts"] if name.startswith(prefix)]
        for number, record in enumerate(records):
            axis.plot([name.removeprefix(prefix) for name in names], [record["facts"][name] for name in names], "o", alpha=0.7, label=f"{number + 1}. seed")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)


STUDY = Study(
    "realign", "e. Hinted decoding and IDFT: cll before and after, and accuracy after training on each set", SETTINGS, TINY, ARMS, run, claims,
    {"samples": "samples", "cll": "cll of the set", "id": "held out", "id_greedy": "greedy", "ood": "subtraction", "entropy": "entropy", "letters": "letters"},
    figure, height=4.4, control="`start`: not trained on any set; `own`: rejection sampling, no hint",
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
