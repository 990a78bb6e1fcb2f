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

Rule, over seeds; reward: share of 200 held-out additions that one sampled answer solves; base: the mean of 12 samplings of the untouched model; S: the
last step of SFT in sft_then_rl, 16 | 20; `sft` is read at S, half way (96 | 80) and at its end (192 | 160):
    shift         reward of the base - of `sft` at S
    readapt       reward of `sft` half way - at S
    overfit       reward of `sft` half way - at the end;  and, for likelihood: held-out NLL of `sft` at the end - half way
    dip           reward of the base - of `sft_then_rl` at S
    smoothed      reward at S of chord_mu - of sft_then_rl; the same for chord_phi: smoothing only where there is a dip, since the mixtures have
                  had S steps of RL by then
    final order   last reward of chord_mu - of sft_then_rl; chord_phi - chord_mu; sft_then_rl - rl; chord_phi - rl   (each as the paper has it)
The first rule read the lowest and highest points of each curve and compared them with one sampling of the base.  Such a number is at least 0 whatever
happens, and noise alone made 0.03 of it: it was replaced, after its results had been seen, by the one above, whose steps come from the schedule.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.dynamics.draw import plot_curves
from benchmarks.dynamics.mixed import TINY, MixedSettings, Way, learn, untouched
from benchmarks.dynamics.study import Claim, Found, Record, Study, main
from megatron_plugin import bind, mu_schedule

ARMS = ("base", "rl", "sft", "sft_then_rl", "chord_mu", "chord_phi")
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
    return untouched(seed, settings, runs) if arm == "base" else learn(way(arm, settings), seed, settings, runs)


def ends(found: Found, arm: str, other: str, name: str) -> list[float]:
    return [a["end"][name] - b["end"][name] for a, b in zip(found[arm], found[other], strict=True)]


def at(record: Record, name: str, step: int) -> float:
    """The value of a curve at the last noted step that is not after `step`."""
    return [value for noted, value in record["curve"][name] if noted <= step][-1]


def stages(record: Record) -> tuple[int, int, int]:
    """Steps at which curves are read: the end of SFT before RL, half of SFT alone, and its end."""
    s = record["settings"]
    return s["sft_first"], s["sft_alone"] // 2, s["sft_alone"]


def early(record: Record) -> dict[str, float]:
    return {"early": at(record, "reward", stages(record)[0])} if record["curve"] else {}


def claims(found: Found) -> list[Claim]:
    bases = [record["end"]["reward"] for record in found["base"]]
    first = {arm: [early(record)["early"] for record in records] for arm, records in found.items() if arm != "base"}
    half, last, nll_half, nll_last = (
        [at(record, name, stages(record)[stage]) for record in found["sft"]] for name, stage in (("reward", 1), ("reward", 2), ("nll", 1), ("nll", 2))
    )

    def less(ours: list[float], others: list[float]) -> list[float]:
        return [x - y for x, y in zip(ours, others, strict=True)]

    order = (("chord_mu", "sft_then_rl"), ("chord_phi", "chord_mu"), ("sft_then_rl", "rl"), ("chord_phi", "rl"))
    return [
        Claim("SFT alone shifts: the reward falls", "reward of the base - of sft at S", less(bases, first["sft"])),
        Claim("SFT alone readapts: the reward comes back", "reward of sft half way - at S", less(half, first["sft"])),
        Claim("SFT alone overfits: the reward falls again", "reward of sft half way - at the end", less(half, last)),
        Claim("SFT alone overfits: held-out NLL rises again", "NLL of sft at the end - half way", less(nll_last, nll_half)),
        Claim("SFT then RL dips", "reward of the base - of sft_then_rl at S", less(bases, first["sft_then_rl"])),
        Claim("at S the decay of mu is above SFT then RL", "reward at S, chord_mu - sft_then_rl", less(first["chord_mu"], first["sft_then_rl"])),
        Claim("at S phi is above SFT then RL", "reward at S, chord_phi - sft_then_rl", less(first["chord_phi"], first["sft_then_rl"])),
        *(Claim(f"final order: {a} above {b}", f"last reward, {a} - {b}", ends(found, a, b, "reward")) for a, b in order),
    ]


def figure(canvas, found: Found) -> None:
    (mixed, entropy), (alone, likelihood) = canvas.subplots(2, 2)
    rest, first = [arm for arm in found if arm not in ("sft", "base")], stages(found["sft"][0])[0]
    plot_curves(mixed, found, "reward", arms=rest, unit="share right, one sample each", title="held-out reward; dotted: S", marks=first)
    plot_curves(entropy, found, "entropy", arms=rest, unit="nats a token", title="entropy of the answers", marks=first)
    plot_curves(alone, found, "reward", arms=["sft"], unit="share right, one sample each", title="SFT alone: held-out reward", marks=first)
    plot_curves(likelihood, found, "nll", arms=["sft"], unit="nats a token", title="SFT alone: NLL of held-out demonstrations", marks=first)
    for axis in (mixed, alone):
        axis.axhline(sum(record["end"]["reward"] for record in found["base"]) / len(found["base"]), color="k", lw=0.8, ls="--", label="base, 12 samplings")
        axis.legend(fontsize=7, framealpha=0.3, loc="lower right")


STUDY = Study(
    "chord_shift", "b. CHORD Fig. 4: SFT then RL, and mixtures; an expert near to the model", SETTINGS, TINY, ARMS, run, claims,
    {"reward": "held out", "greedy": "greedy", "minus": "subtraction", "early": "held out, at S", "entropy": "entropy", "length": "tokens",
     "letters": "letters", "nll": "NLL of demonstrations"},
    figure, height=7.0, control="`rl`: no demonstrations; `base`: not trained, its reward the mean of 12 samplings", derived=early,
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
