"""SRFT: supervised and reinforcement terms of demonstrations and rollouts, weighted by entropy.  T: tokens of this call; sg: stop-gradient."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_plugin.losses.algebra import INF, check_choice, check_number, of_tokens, weighted_nll
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms
from megatron_plugin.losses.grpo import clipped_policy_gradient
from megatron_plugin.losses.luffy import luffy
from megatron_plugin.losses.rollout_options import with_rollout_options

SFT_SHARE, RL_SHARE = 0.5, 0.1
"""The constants in front of w_SFT and w_RL (arXiv 2506.19767, eq. 8 and 12)."""
PRESETS = ("paper", "code")
ENTROPY_SCOPES = ("token", "sequence", "batch")


def srft_demo(
    stats: TokenStats, inputs: TokenInputs, *, entropy_sign: float | Tensor = -1.0, max_weight: float | Tensor = INF
) -> TokenTerms:
    """SRFT on demonstrations, -sg(0.5 e^(entropy_sign H)) log p (arXiv 2506.19767, eq. 8 to 13, the L_SFT term).

    [T] nats.  Paper and released code contradict each other: the paper has e^(-H) (entropy_sign = -1, the default), the code
    `entropy.exp()` with 0.5 outside (entropy_sign = +1).  The code's weight reaches V / 2 (75 968 at V = 151 936): clamp with `max_weight`.
    H is per token, as in the code; the paper writes the entropy of the policy.
    ValueError for an entropy_sign that is neither -1 nor +1 or a max_weight that is not positive.
    """
    check_number("srft_demo", "entropy_sign", entropy_sign)
    if not isinstance(entropy_sign, Tensor) and entropy_sign not in (-1, 1):
        raise ValueError(f"loss 'srft_demo': got entropy_sign={entropy_sign!r}, expected -1 (the paper) or +1 (the released code)")
    check_number("srft_demo", "max_weight", max_weight, above=0, infinite=True)
    weight_T = (SFT_SHARE * (entropy_sign * stats.entropy.detach()).exp()).clamp(max=max_weight)
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T)


@with_rollout_options(prefix="rollout/")
def srft(
    stats: TokenStats,
    inputs: TokenInputs,
    *,
    preset: str = "paper",
    entropy_scope: str = "token",
    max_entropy: float | Tensor = INF,
    wrong_floor: float | Tensor = -10.0,
    gamma: float | Tensor = 0.1,
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.2,
    dual_clip: float | Tensor = 3.0,
) -> TokenTerms:
    """SRFT's four terms, one or two for each token (arXiv 2506.19767, eq. 8 to 13; released code fyqqyf/SRFT, a fork of LUFFY).

                                       preset="paper"                                preset="code"
        demonstration, supervised      -sg(0.5 e^(-H)) log p                         -sg(0.5 e^(+H)) log p
        demonstration, reinforced      -A p, through p                               -A p / (p + gamma), through p (losses/luffy.py)
        own answer, right              -sg(0.1 e^(+H)) log p                         -sg(0.1 e^(+H)) min(r A, clip(r) A) where A > 0
        own answer, wrong              +max(log p, wrong_floor)                      -min(r A, clip(r) A) where A <= 0 (losses/grpo.py)

    [T].  Needs inputs.expert (True: demonstration) and inputs.advantage, that of the group with its demonstrations in it
    (losses/advantages.py: augmented_advantages); "paper" also inputs.extra["reward"], above 0 where the answer is right (the paper's +1 and
    -1; points for form or length belong in the advantage only; not read on demonstrations).  Each term is a mean over its source with unit weight: Source(share=1) twice (parallel/normaliser.py).

    The paper's +log p is unbounded: what a sample made impossible is pushed on at full strength, and the more often a batch is reused, the
    further.  Below `wrong_floor` (nats, default e^-10 = 4.5e-5) a wrong token has no gradient; -inf is the paper.  The default touches
    next to nothing that is sampled at temperature 1.  The code's ratio is bounded by its clips instead (its script switches them off:
    clip_low=1, clip_high=inf, dual_clip=inf).
    e^(+H) reaches V: 0.1 x 151 936 = 15 194.  `max_entropy` (nats) bounds H in all weights, in neither paper nor code; 5 makes it 14.8.
    `entropy_scope`: whose H.  token: its own (the code).  sequence, batch: inputs.extra["entropy"], nats, one value for each token, which
    the caller makes before the step: the mean over the trained tokens of its sequence, or over all of its source in the step (the paper
    writes the entropy of the policy); read from outside, it is the same however the tokens are split, and the loss stays token-local.
    Besides, the options of losses/rollout_options.py, on own answers.
    weight: the factor of -log p, w_SFT on demonstrations; on own answers w_RL or -1 (paper), w_RL or 1 (code).  Metrics, sums over rollout
    tokens: rollout/right and rollout/floored (paper), rollout/ratio and rollout/clip_frac (code).
    ValueError for missing inputs, unknown names, max_entropy < 0, wrong_floor > 0, gamma <= 0, clips as in grpo.
    """
    check_choice("srft", "preset", preset, PRESETS)
    check_choice("srft", "entropy_scope", entropy_scope, ENTROPY_SCOPES)
    check_number("srft", "max_entropy", max_entropy, low=0, infinite=True)
    check_number("srft", "wrong_floor", wrong_floor, high=0, infinite=True)
    expert_T = inputs.require("expert", "srft").bool()
    inputs = replace(inputs, advantage=inputs.require("advantage", "srft").to(stats.logp.dtype))
    entropy_T = stats.entropy.detach() if entropy_scope == "token" else inputs.require("extra.entropy", "srft").to(stats.logp.dtype)
    entropy_T = entropy_T.clamp(max=max_entropy)
    demo, own = of_tokens(expert_T, stats), of_tokens(~expert_T, stats)
    taught = _demonstration(demo, inputs, entropy_T, preset, gamma)
    if preset == "paper":
        learnt = _own_paper(own, inputs, entropy_T, wrong_floor)
    else:
        policy = clipped_policy_gradient("srft", own, inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        learnt = _own_code(policy, inputs, entropy_T)
    metrics = {f"rollout/{name}": torch.where(expert_T, 0.0, column) for name, column in learnt.metrics.items()}
    weight_T = torch.where(expert_T, taught.weight, learnt.weight)  # type: ignore[arg-type]  # both have one
    return TokenTerms(torch.where(expert_T, taught.loss, learnt.loss), weight_T, metrics)


def _demonstration(stats: TokenStats, inputs: TokenInputs, entropy_T: Tensor, preset: str, gamma: float | Tensor) -> TokenTerms:
    sign = -1.0 if preset == "paper" else 1.0
    weight_T = SFT_SHARE * (sign * entropy_T).exp()
    reinforced_T = -inputs.require("advantage", "srft") * stats.logp.exp() if preset == "paper" else luffy(stats, inputs, gamma=gamma).loss
    return TokenTerms(weighted_nll(weight_T, stats.logp) + reinforced_T, weight_T)


def _own_paper(stats: TokenStats, inputs: TokenInputs, entropy_T: Tensor, wrong_floor: float | Tensor) -> TokenTerms:
    right_T = inputs.require("extra.reward", "srft") > 0
    floored_T = ~right_T & (stats.logp.detach() < wrong_floor)
    weight_T = torch.where(right_T, RL_SHARE * entropy_T.exp(), torch.where(floored_T, 0.0, -1.0).to(entropy_T.dtype))
    # clamp, not the weight of 0: the value of a floored token is the floor, and the loss has no jump there
    loss_T = torch.where(right_T, weighted_nll(weight_T.clamp(min=0), stats.logp), stats.logp.clamp(min=wrong_floor))
    return TokenTerms(loss_T, weight_T, {"right": right_T.to(entropy_T.dtype), "floored": floored_T.to(entropy_T.dtype)})


def _own_code(policy: TokenTerms, inputs: TokenInputs, entropy_T: Tensor) -> TokenTerms:
    weight_T = torch.where(inputs.require("advantage", "srft") > 0, RL_SHARE * entropy_T.exp(), 1.0)
    return policy._replace(loss=weight_T * policy.loss, weight=weight_T)
