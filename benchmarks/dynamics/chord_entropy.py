"""a. CHORD, Fig. 5: what expert tokens do to the policy's entropy under three weights (arXiv 2508.11408).

    python -m benchmarks.dynamics.chord_entropy

A table of logits [C contexts, V tokens]: some contexts sure, some not.  The expert says in each context what the policy would say (with probability
1 - off), or one of a few tokens that the policy finds absurd.  Plain gradient descent on the exact expectation: every (context, token) pair is a row of
the loss, its probability the coefficient.  Twice: on the expert alone, and mixed with the exact policy gradient of GRPO.

The paper: without importance sampling (none: SFT) entropy explodes, with it (is: exactly DFT) it collapses, phi = p(1 - p) keeps it.

What must happen in the end follows from the gradients.  With expert probabilities q, on a table, each weight ascends
    none    sum q log p                     ->  p = q
    is      sum q p                         ->  one token with p = 1
    phi     sum q (p - p^2 / 2)             ->  p = max(0, 1 - lambda / q), lambda such that it sums to 1
which `destination` computes and tests/test_dynamics.py holds against a run.

Rule, over seeds; H: mean entropy over contexts, nats.  change: H(end) - H(start) on the expert alone; in the mixture (mu = 0.1) the mean over the run
of H (trapezoids: the steps noted are not evenly spaced) minus that of RL only, which lowers entropy by itself: not whether entropy rises, which it does
under no arm, but what the expert adds.  RL only has the share 1 - mu, too: a first run gave it the whole, and all mixtures, whose RL
is then weaker, seemed to keep entropy (is: +0.016 +- 0.001).
    none rises (mixed: stays above RL only)           change of none
    is collapses (mixed: falls below RL only)         -(change of is)
    phi is between          min(|change of none|, |change of is|) - |change of phi|
    phi keeps the entropy   min(|change of none|, |change of is|) / 3 - |change of phi|
Control of the expert alone: off = 0, where plain SFT has no gradient at all.  The contexts are as sure as a language model's: 0.7 nats on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.dynamics.draw import minus, plot_curves
from benchmarks.dynamics.study import Claim, Found, Record, Study, main
from megatron_plugin import TokenInputs, bind, token_loss

WEIGHTS = {"none": "mu", "is": "is", "phi": "phi"}  # arm -> preset of loss chord: the weight of its expert tokens
EXPERT_ONLY, MIXED = ("none", "is", "phi", "none_in_model"), ("rl_only", "rl_none", "rl_is", "rl_phi")


@dataclass(frozen=True)
class Settings:
    contexts: int = 32
    vocabulary: int = 50
    off: float = 0.3
    off_tokens: int = 4
    mu: float = 0.1
    sharp: tuple[float, float] = (4.0, 12.0)
    """Deviation of a context's logits, drawn evenly."""
    lr: float = 0.5
    steps: int = 300
    mixed_steps: int = 100


SETTINGS, TINY = Settings(), Settings(contexts=4, vocabulary=8, off_tokens=2, steps=4, mixed_steps=4)


@dataclass(frozen=True)
class World:
    """[C, V] each: logits of the start, expert probabilities, rewards."""

    start: Tensor
    expert: Tensor
    reward: Tensor


def world(seed: int, settings: Settings, *, off: float | None = None) -> World:
    """Contexts from sure to unsure; the expert's own tokens are the least likely ones; half of what the policy says is right."""
    generator = torch.Generator().manual_seed(seed)
    C, V = settings.contexts, settings.vocabulary
    low, high = settings.sharp
    sharpness_C1 = low + (high - low) * torch.rand(C, 1, generator=generator, dtype=torch.float64)
    start = sharpness_C1 * torch.randn(C, V, generator=generator, dtype=torch.float64)
    policy = start.softmax(-1)
    strange = torch.zeros_like(policy).scatter_(1, policy.argsort(-1)[:, : settings.off_tokens], 1 / settings.off_tokens)
    share = settings.off if off is None else off
    reward = (torch.rand(C, V, generator=generator) < 0.5).double()
    return World(start, (1 - share) * policy + share * strange, reward)


def gradient(logits: Tensor, there: World, weight: str | None, mu: float) -> Tensor:
    """d/dlogits of the objective, summed over contexts: mu x expert (weight: an arm of WEIGHTS) and 1 - mu x policy gradient."""
    C, V = logits.shape
    logits = logits.detach().requires_grad_()
    labels, parts = torch.arange(V).repeat(C), []
    if weight is not None:
        parts.append((mu * there.expert, True, torch.zeros_like(there.expert)))
    if mu < 1:
        policy = logits.detach().softmax(-1)
        parts.append(((1 - mu) * policy, False, advantages(policy, there.reward)))
    rows = torch.cat([logits.repeat_interleave(V, 0)] * len(parts))
    inputs = TokenInputs(
        coefficient=torch.cat([share.reshape(-1) for share, _, _ in parts]), advantage=torch.cat([a.reshape(-1) for _, _, a in parts]),
        expert=torch.cat([torch.full((C * V,), expert) for _, expert, _ in parts]),
    )  # fmt: skip
    loss = bind("chord", preset=WEIGHTS[weight or "none"])
    token_loss(rows, labels.repeat(len(parts)), loss, inputs=inputs).loss_sum.backward()
    return logits.grad


def advantages(policy: Tensor, reward: Tensor) -> Tensor:
    """GRPO's advantages in the limit of a large group: by mean and deviation under the policy."""
    mean = (policy * reward).sum(-1, keepdim=True)
    deviation = (policy * (reward - mean).square()).sum(-1, keepdim=True).sqrt()
    return (reward - mean) / (deviation + 1e-6)


def entropy(logits: Tensor) -> Tensor:
    """[C], nats."""
    logp = logits.log_softmax(-1)
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)


def destination(expert: Tensor, weight: str) -> Tensor:
    """Where descent on the expert alone ends, [C, V] probabilities."""
    if weight == "none":
        return expert
    if weight == "is":
        return torch.nn.functional.one_hot(expert.argmax(-1), expert.shape[-1]).to(expert.dtype)
    inverse, order = expert.reciprocal().sort(-1)  # the likeliest first
    kept = torch.arange(1, expert.shape[-1] + 1)
    level = (kept - 1) / inverse.cumsum(-1)  # lambda where the first k tokens are in: k - lambda sum 1/q = 1
    fits = (level * inverse < 1).sum(-1, keepdim=True)  # the level rises with k: the last token that is still above it
    filled = (1 - level.gather(-1, fits - 1) * inverse).clamp(min=0)
    return torch.zeros_like(expert).scatter_(-1, order, filled)


def run(arm: str, seed: int, settings: Settings, runs: Path) -> Record:
    mixed, weight = arm.startswith("rl_"), next((name for name in WEIGHTS if name in arm.split("_")), None)
    there = world(seed, settings, off=0.0 if arm == "none_in_model" else None)
    logits, curve = there.start, [[0, float(entropy(there.start).mean())]]
    right = [[0, float((there.start.softmax(-1) * there.reward).sum(-1).mean())]]
    for step in range(1, (settings.mixed_steps if mixed else settings.steps) + 1):
        logits = logits - settings.lr * gradient(logits, there, weight, settings.mu if mixed else 1.0)
        if step % 5 == 0 or step < 30:
            curve.append([step, float(entropy(logits).mean())])
            right.append([step, float((logits.softmax(-1) * there.reward).sum(-1).mean())])
    strange = 1 - float((logits.softmax(-1) * (there.start.softmax(-1) > 1e-3)).sum(-1).mean())
    there_in_the_end = {} if mixed else {"destination": float(entropy(destination(there.expert, weight).log()).mean())}
    end = {"start": curve[0][1], "end": curve[-1][1], **there_in_the_end, "reward": right[-1][1], "strange": strange}
    return {"end": end, "curve": {"entropy": curve, "reward": right}}


def mean_over_run(curve: list[list[float]]) -> float:
    """By trapezoids."""
    area = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(curve))
    return area / (curve[-1][0] - curve[0][0])


def change(found: Found, arm: str) -> list[float]:
    if arm.startswith("rl_"):
        means = ([mean_over_run(record["curve"]["entropy"]) for record in found[x]] for x in (arm, "rl_only"))
        return [with_expert - alone for with_expert, alone in zip(*means, strict=True)]
    return [record["end"]["end"] - record["end"]["start"] for record in found[arm]]


def claims(found: Found) -> list[Claim]:
    made = []
    for prefix, where, of in (("", "the expert alone", "H at the end - at the start, {}"), ("rl_", "mixed with RL", "mean over the run of H, {} - RL only")):
        rises, falls = ("rises", "collapses") if not prefix else ("stays above that of RL alone", "falls below that of RL alone")
        none, important, phi = (change(found, prefix + arm) for arm in WEIGHTS)
        smaller = [(min(abs(a), abs(b)), abs(c)) for a, b, c in zip(none, important, phi, strict=True)]
        made += [
            Claim(f"{where}: entropy {rises} without importance sampling", of.format("none"), none),
            Claim(f"{where}: entropy {falls} with importance sampling (DFT)", "minus: " + of.format("is"), [-x for x in important]),
            Claim(f"{where}: phi is between the two", "the smaller size of these two - that of phi", [least - own for least, own in smaller]),
            Claim(f"{where}: phi keeps the entropy", "a third of the smaller - that of phi", [least / 3 - own for least, own in smaller]),
        ]
    return made


def figure(canvas, found: Found) -> None:
    left, right, reward = canvas.subplots(1, 3)
    plot_curves(left, found, "entropy", arms=EXPERT_ONLY, unit="nats, mean of the contexts", title="expert alone: entropy")
    lessened, mixed = minus(found, "rl_only"), [arm for arm in MIXED if arm != "rl_only"]
    plot_curves(right, lessened, "entropy", arms=mixed, unit="nats (linear within 0.01)", title="mixed with RL: entropy - that of RL only")
    plot_curves(reward, lessened, "reward", arms=mixed, unit="expected reward (linear within 0.001)", title="mixed with RL: reward - that of RL only")
    for axis in (left, right, reward):
        axis.set_xscale("symlog", linthresh=10)
    right.set_yscale("symlog", linthresh=0.01)
    reward.set_yscale("symlog", linthresh=0.001)


STUDY = Study(
    "chord_entropy", "a. CHORD Fig. 5 on a table: entropy under expert tokens", SETTINGS, TINY, (*EXPERT_ONLY, *MIXED), run, claims,
    {"start": "H, start", "end": "H, end", "destination": "H, in the limit", "reward": "reward, end", "strange": "mass where the start had < 1e-3"},
    figure, control="`none_in_model`: the expert says only what the policy says; `rl_only`: no expert, the same share 1 - mu of RL",
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
