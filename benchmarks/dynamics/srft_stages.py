"""d. SRFT: one stage of four terms against SFT then RL and RL; what its two weights do; and which sign the entropy has (arXiv 2506.19767).

    python -m benchmarks.dynamics.srft_stages         # shares the arms rl and sft_then_rl, and the base model, with chord_shift

    srft             0.5 e^(-H) on demonstrations, as the paper writes it; 0.1 e^(+H) on right answers of its own (megatron_plugin/losses/srft.py)
    srft_plus        0.5 e^(+H) on demonstrations, as the released code has it; all else the same
    w_sft_one        the weight of demonstrations is 1, the paper's ablation            w_rl_one    that of right answers is 1
    same_minus, same_plus   e^(-H) and e^(+H), each scaled in every step so that the mean weight of demonstrations is 0.4: the sign alone, where
                     srft against srft_plus changes the strength of SFT, too
    rl               the control: no demonstrations                                     sft_then_rl 16 steps of SFT before it

All draw 12 x 8 answers in each of 32 steps.  SRFT's questions are those of its demonstrations, 200 additions, one demonstration joining each group; those
of rl and sft_then_rl are new additions and subtractions in every step: not the same data.  Neither RL on SRFT's questions nor a constant weight of 0.4 was run.

Rule, over seeds; reward: share of 200 held-out additions that one sampled answer solves, at the end:
    single stage    srft - sft_then_rl;  srft - rl;  sft_then_rl - rl           (the paper: 59.5, 52.5, 49.4)
    smaller dip     reward at step 16, srft - sft_then_rl     (a dip or not: chord_shift.py; why not the lowest on the way: there, too)
    w_SFT, w_RL     srft - w_sft_one;  srft - w_rl_one                          (the paper: 4.0 and 2.9 points)
    the sign        srft - srft_plus, as published;  same_minus - same_plus, at one strength
    entropy         entropy of the answers at the end, srft - rl                (the paper: SRFT keeps more of it than RL)
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.dynamics import chord_shift
from benchmarks.dynamics.chord_shift import early, ends
from benchmarks.dynamics.draw import plot_curves
from benchmarks.dynamics.mixed import TINY, MixedSettings, Way, learn
from benchmarks.dynamics.study import Claim, Found, Record, Study, main
from megatron_plugin import TokenInputs, TokenStats, TokenTerms, bind
from megatron_plugin.losses.srft import SFT_SHARE, srft

SHARED = ("base", "rl", "sft_then_rl")
VARIANTS = {
    "srft": {}, "srft_plus": {"sft_weight": "plus"}, "w_sft_one": {"sft_weight": "one"}, "w_rl_one": {"rl_weight": "one"},
    "same_minus": {"sft_weight": "minus", "sft_mean": 0.4}, "same_plus": {"sft_weight": "plus", "sft_mean": 0.4},
}  # fmt: skip
ARMS = (*SHARED, *VARIANTS)


def srft_variant(
    stats: TokenStats, inputs: TokenInputs, *, sft_weight: str = "minus", sft_mean: float = 0.0, rl_weight: str = "plus"
) -> TokenTerms:
    """`srft` as the paper has it with another weight of demonstrations (minus, plus: the sign of H; one) or of right answers (plus, one).

    sft_mean above 0: the weights of this call's demonstrations are scaled to that mean, which needs all of them first (two passes)."""
    terms = srft(stats, inputs)
    entropy_T, expert_T = stats.entropy.detach(), inputs.expert.bool()
    right_T = ~expert_T & (inputs.extra["reward"] > 0)
    taught_T = {"minus": SFT_SHARE * (-entropy_T).exp(), "plus": SFT_SHARE * entropy_T.exp(), "one": torch.ones_like(entropy_T)}[sft_weight]
    if sft_mean:
        live_T = expert_T & (inputs.coefficient != 0)
        taught_T = taught_T * (sft_mean / taught_T[live_T].mean())
    weight_T = torch.where(expert_T, taught_T, terms.weight)
    if rl_weight == "one":
        weight_T = torch.where(right_T, 1.0, weight_T)
    changed_T = torch.where(expert_T | right_T, weight_T - terms.weight, 0.0)
    return TokenTerms(terms.loss - changed_T * stats.logp, weight_T)


def run(arm: str, seed: int, settings: MixedSettings, runs: Path) -> Record:
    """Of the arms that are this study's own."""
    way = Way(bind(srft_variant, **VARIANTS[arm]), mixed=settings.steps, same_questions=True, lr=settings.lr)
    return learn(way, seed, settings, runs)


def claims(found: Found) -> list[Claim]:
    pairs = {
        "SRFT is better than SFT then RL": ("srft", "sft_then_rl"), "SRFT is better than RL": ("srft", "rl"),
        "SFT then RL is better than RL": ("sft_then_rl", "rl"), "w_SFT is better than 1": ("srft", "w_sft_one"), "w_RL is better than 1": ("srft", "w_rl_one"),
        "the paper's sign is better, as published": ("srft", "srft_plus"),
        "the paper's sign is better, at one strength": ("same_minus", "same_plus"),
    }  # fmt: skip
    return [
        *(Claim(statement, f"reward at the end, {a} - {b}", ends(found, a, b, "reward")) for statement, (a, b) in pairs.items()),
        Claim("at step 16 SRFT is above SFT then RL", "reward at step 16, srft - sft_then_rl",
              [early(a)["early"] - early(b)["early"] for a, b in zip(found["srft"], found["sft_then_rl"], strict=True)]),
        Claim("SRFT keeps more entropy than RL", "entropy at the end, srft - rl", ends(found, "srft", "rl", "entropy")),
    ]


def figure(canvas, found: Found) -> None:
    stages, ablated, entropy = canvas.subplots(1, 3)
    right = "share right, one sample each"
    plot_curves(stages, found, "reward", arms=["rl", "sft_then_rl", "srft"], unit=right, title="held-out reward")
    plot_curves(ablated, found, "reward", arms=list(VARIANTS), unit=right, title="held-out reward: variants")
    plot_curves(entropy, found, "entropy", arms=["rl", "sft_then_rl", "srft", "srft_plus", "w_sft_one"], unit="nats a token", title="entropy of the answers")


STUDY = Study(
    "srft_stages", "d. SRFT: one stage, its weights, and the sign of the entropy", chord_shift.SETTINGS, TINY, ARMS, run, claims,
    {"reward": "held out", "greedy": "greedy", "minus": "subtraction", "early": "held out, step 16", "entropy": "entropy", "length": "tokens",
     "letters": "letters", "nll": "NLL of demonstrations"},
    figure, height=4.6, control="`rl`: no demonstrations; `base`: not trained, its reward the mean of 12 samplings",
    shared=dict.fromkeys(SHARED, chord_shift.STUDY), derived=early,
    notes=("SRFT's questions are 200 additions, those of `rl` and `sft_then_rl` new additions and subtractions: not the same data.",),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
