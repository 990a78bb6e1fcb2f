"""c. DFT, CHORD-phi and IDFT against SFT without any RL: what is kept, what cannot be learnt (arXiv 2508.05629, 2508.11408, 2602.12222).

    python -m benchmarks.dynamics.dft_generalise

Two data sets, from one base model:
    style   500 additions solved as the expert does: another style than the base's, many right ways to one answer, now and then a letter that
            the base has never seen.  Held out: additions (in distribution) and subtractions (out of it: the base can do them, the data has none).
    facts   50 facts that the base cannot know: one right answer, which has to be learnt by heart.

The papers: DFT generalises better than SFT, in and out of distribution; it is weak where the model lacks the fact (Natural Questions 36.6 against 30.1);
it drives token probabilities to both ends, where SFT lifts them all.  IDFT is better than DFT.

Rule, over seeds; accuracies are of one sampled answer to each of 200 held-out problems:
    in distribution       accuracy of DFT - of SFT; the same for CHORD-phi and IDFT
    out of distribution   accuracy of DFT - of SFT; the same for CHORD-phi and IDFT
    IDFT above DFT        accuracy of IDFT - of DFT, in distribution
    facts                 accuracy of SFT - of DFT
    bimodal               over the tokens of the training data: share with p in [0.1, 0.9] under the base - under DFT; share with p < 0.1 under DFT -
                          under SFT (that it does not fall as under SFT, not that it grows); share with p > 0.9 under DFT - under the base
Control: `base`, not trained at all.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.dynamics.base import STEPS, base, held_out
from benchmarks.dynamics.columns import VOCABULARY, Facts, draw_problems, expert_style, letters
from benchmarks.dynamics.draw import plot_curves
from benchmarks.dynamics.learn import Part, Trainer, demonstrations, evaluate, expert_statistics, passes
from benchmarks.dynamics.model import Size, TinyLlama
from benchmarks.dynamics.study import Claim, Found, Record, Study, main
from megatron_plugin import bind

METHODS = ("sft", "dft", "chord_phi", "idft")
ARMS = ("base", *(f"style_{method}" for method in METHODS), "facts_sft", "facts_dft")
BINS = 20


@dataclass(frozen=True)
class Settings:
    filler: float = 0.1
    demos: int = 500
    steps: int = 80
    batch: int = 64
    lr: float = 2e-4
    facts: int = 50
    fact_steps: int = 240
    fact_lr: float = 1e-3
    warm_up: int = 10
    evaluated: int = 200
    every: int = 20
    base_steps: int = STEPS
    size: Size | None = None


SETTINGS = Settings()
TINY = Settings(
    demos=8, steps=2, batch=4, facts=3, fact_steps=2, warm_up=1, evaluated=4, every=1, base_steps=2,
    size=Size(VOCABULARY, width=16, layers=1, heads=2, inner=32),
)  # fmt: skip


def data(arm: str, seed: int, settings: Settings) -> tuple[list, list, Part]:
    """Training demonstrations, problems that are evaluated, and held-out demonstrations as a part."""
    rng = random.Random(f"dft_generalise {arm.partition('_')[0]} {seed}")
    if arm.startswith("facts"):
        facts = Facts.made(settings.facts, rng)
        demos = [(problem, facts.solved(problem)) for problem in (facts.problem(rng) for _ in range(settings.demos))]
        fresh = [facts.problem(rng) for _ in range(settings.evaluated)]
        return demos, fresh, demonstrations([(problem, facts.solved(problem)) for problem in fresh])
    style, kept = expert_style(settings.filler), held_out("+")[: settings.evaluated]
    demos = [(problem, problem.solved(style, rng)) for problem in draw_problems(settings.demos, "+", rng)]
    return demos, kept, demonstrations([(problem, problem.solved(style, rng)) for problem in kept])


def measured(model: TinyLlama, trained: Part, held: Part) -> dict[str, float]:
    """NLL of demonstrations, and where the probabilities of the training data's tokens lie."""
    logp, _, labels = expert_statistics(model, held)
    p = expert_statistics(model, trained)[0].exp()
    strange = letters(labels)
    of_letters = {"nll_letters": float(-logp[strange].mean())} if strange.any() else {}
    return {"nll": float(-logp.mean()), **of_letters, "p_low": float((p < 0.1).float().mean()), "p_high": float((p > 0.9).float().mean()),
            "p_middle": float(((p >= 0.1) & (p <= 0.9)).float().mean())}  # fmt: skip


def run(arm: str, seed: int, settings: Settings, runs: Path) -> Record:
    model = base(seed, settings.base_steps, runs=runs, size=settings.size)
    demos, problems, held = data("style" if arm == "base" else arm, seed, settings)
    facts, minus = arm.startswith("facts"), held_out("-")[: settings.evaluated]
    trained = demonstrations(demos)
    curve: dict[str, list] = {"accuracy": [], "nll": []}

    def note(step: int) -> None:
        curve["accuracy"].append([step, evaluate(model, problems, seed=step).right])
        curve["nll"].append([step, measured(model, trained, held)["nll"]])

    note(0)
    if arm != "base":
        trainer = Trainer(model, settings.fact_lr if facts else settings.lr)
        loss, batches, steps = bind(arm.partition("_")[2]), passes(demos, settings.batch, random.Random(seed)), settings.fact_steps if facts else settings.steps
        for step in range(1, steps + 1):
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            trainer.step([demonstrations(next(batches))], loss, lr_factor=cosine * min(1.0, step / settings.warm_up))
            if step % (settings.every * (3 if facts else 1)) == 0:
                note(step)
    sampled = evaluate(model, problems, seed=1)
    end = {"id": sampled.right, "id_greedy": evaluate(model, problems, seed=None).right, "entropy": sampled.entropy, **measured(model, trained, held)}
    if not facts:
        end |= {"ood": evaluate(model, minus, seed=1).right, "ood_greedy": evaluate(model, minus, seed=None).right}
    p = expert_statistics(model, trained)[0].exp()
    return {"end": end, "curve": curve, "histogram": (torch.histc(p, BINS, 0, 1) / len(p)).tolist()}


def difference(found: Found, arm: str, other: str, name: str) -> list[float]:
    return [a["end"][name] - b["end"][name] for a, b in zip(found[arm], found[other], strict=True)]


def claims(found: Found) -> list[Claim]:
    made = []
    for name, where in (("id", "in distribution"), ("ood", "out of distribution")):
        for method in METHODS[1:]:
            made.append(Claim(f"{where}: {method} is better than SFT", f"accuracy of {method} - of SFT", difference(found, f"style_{method}", "style_sft", name)))
    return [
        *made,
        Claim("in distribution: idft is better than dft", "accuracy of idft - of dft", difference(found, "style_idft", "style_dft", "id")),
        Claim("facts that the model lacks: SFT learns them, DFT does not", "accuracy of SFT - of dft", difference(found, "facts_sft", "facts_dft", "id")),
        Claim("bimodal: DFT empties the middle", "share of p in [0.1, 0.9], base - dft", difference(found, "base", "style_dft", "p_middle")),
        Claim("bimodal: DFT leaves behind what SFT lifts", "share of p < 0.1, dft - SFT", difference(found, "style_dft", "style_sft", "p_low")),
        Claim("bimodal: DFT fills the upper end", "share of p > 0.9, dft - base", difference(found, "style_dft", "base", "p_high")),
    ]


def figure(canvas, found: Found) -> None:
    style, facts, histogram = canvas.subplots(1, 3)
    plot_curves(style, found, "accuracy", arms=[arm for arm in ARMS if arm.startswith("style")], unit="share right, one sample each", title="style: held-out accuracy")
    plot_curves(facts, found, "accuracy", arms=[arm for arm in ARMS if arm.startswith("facts")], unit="share right, one sample each", title="facts: accuracy")
    for colour, (arm, records) in enumerate(found.items()):
        if arm == "base" or arm.startswith("style"):
            mean = torch.tensor([record["histogram"] for record in records]).mean(0)
            histogram.stairs(mean, torch.linspace(0, 1, BINS + 1), color=f"C{colour}", label=arm.replace("_", " "))
    histogram.set_yscale("log")
    histogram.set_title("style: p of the training tokens; mean of seeds", fontsize=10)
    histogram.set_xlabel("probability of the token")
    histogram.set_ylabel(f"share of the tokens, {BINS} bins (log)")
    histogram.legend(fontsize=7)


STUDY = Study(
    "dft_generalise", "c. DFT, CHORD-phi, IDFT and SFT: held-out accuracy, facts, token probabilities", SETTINGS, TINY, ARMS, run, claims,
    {"id": "held out", "id_greedy": "greedy", "ood": "out of distribution", "ood_greedy": "greedy", "entropy": "entropy", "nll": "NLL held out",
     "nll_letters": "of letters", "p_low": "p < 0.1", "p_middle": "0.1 to 0.9", "p_high": "p > 0.9"},
    figure, height=4.4, control="`base`: not trained", seeds=(0, 1, 2, 3, 4),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
