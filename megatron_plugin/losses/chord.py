"""CHORD: demonstrations and rollouts in one objective.  T: tokens of this call; sg: stop-gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_plugin.losses.algebra import check_choice, of_tokens, weighted_nll
from megatron_plugin.losses.contract import TokenInputs, TokenStats, TokenTerms
from megatron_plugin.losses.dft import sft_is
from megatron_plugin.losses.grpo import clipped_policy_gradient
from megatron_plugin.losses.rollout_options import with_rollout_options
from megatron_plugin.losses.sft import sft


def chord_phi(stats: TokenStats, inputs: TokenInputs) -> TokenTerms:
    """CHORD-phi, -sg(p (1 - p)) log p: quiet on tokens the model is sure of and on those it finds absurd (arXiv 2508.11408, sec. 4).

    [T] nats.  Only the token loss of expert data; `chord` is the mixture with GRPO.  The paper averages over the tokens of the batch;
    Trinity and ms-swift average micro-batch means, which is not copied.
    Metric phi: the weight, at most 0.25.
    """
    logp_T = stats.logp.detach()
    weight_T = logp_T.exp() * -torch.expm1(logp_T)  # 1 - exp(logp) cancels in fp32 where logp > -1e-7
    return TokenTerms(loss=weighted_nll(weight_T, stats.logp), weight=weight_T, metrics={"phi": weight_T})


EXPERT_TERM = {"mu": sft, "phi": chord_phi, "is": sft_is, "shipped": chord_phi, "trinity": chord_phi}
EXPERT_TERM |= {f"chord_{name}": EXPERT_TERM[name] for name in ("mu", "phi", "is")}
"""Preset -> loss of an expert token.  The presets of MU_PRESETS (schedules/mu.py), which has the mu that goes with each."""


@with_rollout_options(prefix="rollout/")
def chord(
    stats: TokenStats,
    inputs: TokenInputs,
    *,
    preset: str = "phi",
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.2,
    dual_clip: float | Tensor = 3.0,
) -> TokenTerms:
    """CHORD, (1 - mu) L_GRPO + mu L_SFT-phi (arXiv 2508.11408, eq. 3 and 6): the term of each token; mu is in the coefficient.

    An expert token (inputs.expert) has -sg(phi) log p in nats, a rollout token GRPO's clipped term (losses/grpo.py; needs
    inputs.advantage, which is not read on expert tokens).  phi by preset:
        mu                1, SFT: mu decays                  is    p, the paper's importance-sampling baseline (eq. 4), exactly DFT
        phi               p (1 - p): mu is constant          shipped, trinity    p (1 - p): other schedules of mu
    `inputs.coefficient` holds mu / N_expert on expert tokens and (1 - mu) / Z_rollout on rollout tokens, so both means are over the
    whole step (parallel/normaliser.py: Source(share=mu), Source(share=1 - mu)); both kinds may be packed in one row.  Trinity averages
    the token means of micro-batches by samples, ms-swift divides by the micro-batch's own tokens: not copied.
    Besides, the options of losses/rollout_options.py, which leave expert tokens alone.
    weight: phi on expert tokens, 1 on rollout tokens.  Metrics: expert/phi (that weight, sum over expert tokens), rollout/ratio and
    rollout/clip_frac (as grpo's, sums over rollout tokens).  Divide each by the live tokens of its own source.
    ValueError without expert or advantage, for an unknown preset, and for clips as in grpo.
    """
    check_choice("chord", "preset", preset, EXPERT_TERM)
    expert_T = inputs.require("expert", "chord").bool()
    policy = clipped_policy_gradient("chord", of_tokens(~expert_T, stats), inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    taught = EXPERT_TERM[preset](of_tokens(expert_T, stats), inputs)
    phi_T = torch.ones_like(stats.logp) if taught.weight is None else taught.weight
    metrics = {"expert/phi": torch.where(expert_T, phi_T, 0.0)}
    metrics |= {f"rollout/{name}": torch.where(expert_T, 0.0, column) for name, column in policy.metrics.items()}
    return TokenTerms(torch.where(expert_T, taught.loss, policy.loss), torch.where(expert_T, phi_T, 1.0), metrics)
