"""b. CHORD, Fig. 4: SFT shifts the policy away, RL brings it back; mixing is to smooth that (arXiv 2508.11408).

    python -m benchmarks.dynamics.chord_shift              # an expert near to the model
    python -m benchmarks.dynamics.chord_shift_far          # the same, an expert far from it

From one base model, on demonstrations of another style (the long one, before a column now and then a letter that the base has never seen:
one in ten near, three in ten far).  Steps, near | far::
    sft            SFT alone, for a long time: the paper's shift - readapt - overfit
    sft_then_rl    16 | 20 steps of SFT (of 32 | 64 rows), then 32 | 40 of GRPO
    chord_mu       GRPO mixed with SFT whose share mu falls from 0.5 to 0.02 over the first half of 32 | 40 steps
    chord_phi      GRPO mixed with p(1 - p)-weighted SFT, mu = 0.5 for all of 32 | 40 steps
    rl             32 | 40 steps of GRPO: the control

Rule, over seeds; reward: share of 200 held-out additions that one sampled answer solves:
    shift         reward of the base - the lowest of `sft`, both along one run
    readapt       the highest reward of `sft` after its lowest - the lowest
    overfit       that highest reward - the last of `sft`;  and, for likelihood: the last held-out NLL of `sft` - the lowest
    dip           reward of the base - the lowest of `sft_then_rl`
    smoothed      the lowest reward of chord_mu - of sft_then_rl; the same for chord_phi
    final order   last reward of chord_mu - of sft_then_rl; chord_phi - chord_mu; sft_then_rl - rl; chord_phi - rl   (each as the paper has it)
A lowest or highest is picked out of several noisy values, which pulls "shift" and "dip" up by about a standard deviation of one value, 0.03; they are
shown only where the error over seeds says so, and the sizes are to be read with that in mind.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.dynamics.mixed import TINY, MixedSettings, Way, learn
from benchmarks.dynamics.study import Claim, Found, Record, Study, main, plot_curves
from megatron_plugin import bind, mu_schedule

ARMS = ("rl", "sft", "sft_then_rl", "chord_mu", "chord_phi")
SETTINGS = MixedSettings()


def way(arm: str, s: MixedSettings) -> Way:
    mixed = {"mixed": s.steps, "lr": s.lr}
    if arm == "sft":
        return Way(None, supervised=s.sft_alone, lr=s.sft_lr)
    if arm == "chord_mu":
        falling = partial(mu_schedule, warmup_steps=0, decay_steps=s.decay, peak=s.mu_peak, valley=s.mu_valley)
        return Way(bind("chord", preset="mu"), mu=falling, **mixed)
    if arm == "chord_phi":
        return Way(bind("chord", preset="phi"), mu=lambda step: s.mu_phi, **mixed)
    return Way(bind("grpo"), supervised=s.sft_first if arm == "sft_then_rl" else 0, **mixed)


def run(arm: str, seed: int, settings: MixedSettings, runs: Path) -> Record:
    return learn(way(arm, settings), seed, settings, runs)


def ends(found: Found, arm: str, other: str, name: str) -> list[float]:
    return [a["end"][name] - b["end"][name] for a, b in zip(found[arm], found[other], strict=True)]


def phases(record: Record) -> tuple[float, float, float]:
    """Of one curve of rewards: start - lowest, highest after that - lowest, that highest - last."""
    rewards = [value for _, value in record["curve"]["reward"]]
    lowest = rewards.index(min(rewards))
    highest = max(rewards[lowest:])
    return rewards[0] - rewards[lowest], highest - rewards[lowest], highest - rewards[-1]


def claims(found: Found) -> list[Claim]:
    shift, readapt, overfit = zip(*map(phases, found["sft"]), strict=True)
    nll = [[value for _, value in record["curve"]["nll"]] for record in found["sft"]]
    dip = [phases(record)[0] for record in found["sft_then_rl"]]
    order = (("chord_mu", "sft_then_rl"), ("chord_phi", "chord_mu"), ("sft_then_rl", "rl"), ("chord_phi", "rl"))
    return [
        Claim("SFT alone shifts: the reward falls", "reward of the base - lowest of sft", list(shift)),
        Claim("SFT alone readapts: the reward comes back", "highest reward after the lowest - the lowest", list(readapt)),
        Claim("SFT alone overfits: the reward falls again", "that highest reward - the last", list(overfit)),
        Claim("SFT alone overfits: held-out NLL rises again", "last NLL - lowest NLL", [curve[-1] - min(curve) for curve in nll]),
        Claim("SFT then RL dips", "reward of the base - lowest of sft_then_rl", dip),
        Claim("the decay of mu smooths the dip", "lowest reward, chord_mu - sft_then_rl", ends(found, "chord_mu", "sft_then_rl", "lowest")),
        Claim("phi smooths the dip", "lowest reward, chord_phi - sft_then_rl", ends(found, "chord_phi", "sft_then_rl", "lowest")),
        *(Claim(f"final order: {a} above {b}", f"last reward, {a} - {b}", ends(found, a, b, "reward")) for a, b in order),
    ]


def figure(canvas, found: Found) -> None:
    mixed, alone, entropy = canvas.subplots(1, 3)
    rest = [arm for arm in found if arm != "sft"]
    plot_curves(mixed, found, "reward", arms=rest, title="held-out reward")
    plot_curves(alone, found, "reward", arms=["sft"], title="SFT alone: held-out reward, and NLL of demonstrations (dashed)")
    twin = alone.twinx()
    for record in found["sft"]:
        twin.plot(*zip(*record["curve"]["nll"], strict=True), "k--", lw=0.8)
    plot_curves(entropy, found, "entropy", arms=rest, title="entropy of answers, nats")


STUDY = Study(
    "chord_shift", "b. CHORD Fig. 4: SFT then RL, and mixtures; an expert near to the model", SETTINGS, TINY, ARMS, run, claims,
    {"reward": "held out", "greedy": "greedy", "minus": "subtraction", "lowest": "lowest on the way", "entropy": "entropy", "length": "tokens",
     "letters": "letters", "nll": "NLL of demonstrations"},
    figure, control="`rl`: no demonstrations",
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
