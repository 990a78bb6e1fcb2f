"""ms-swift's cells.  How its code is called is in swift_peer.py; it casts logits to fp32, so its own losses are compared in fp32 only."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from megatron_plugin import TokenTerms, token_loss
from megatron_plugin.losses.grpo import clipped_policy_gradient
from megatron_plugin.losses.kl import kl_estimate
from megatron_plugin.parallel.normaliser import Source
from tests.parity import ours
from tests.parity import swift_peer as swift
from tests.parity.advantages import group_cells
from tests.parity.case import NEVER_SAMPLED, Case, make_case
from tests.parity.cell import Cell
from tests.parity.ours import CONSTANT, HALVES, SEQUENCE, Answer, gradient, leaf, live_over_all
from tests.parity.schedule import mu_cells
from tests.parity.swift_peer import theirs

GRPO = "GRPOTrainer._compute_loss_and_metrics"
RATIO = f"{GRPO}, rollout_importance_sampling_mode"
NO_DUAL = {"dual_clip": float("inf")}
MU, WITH_GAP = 0.3, ("plain", "ugly", "hot", "gap")
SINGLE = (torch.float32,)


def mine(name="grpo", *source, **options):
    return ours.mine(name, *source, **(NO_DUAL if name == "grpo" else {}) | options)


def each_token(case: Case, loss: str) -> Answer:
    logits = leaf(case)
    out = token_loss(logits, case.labels.masked_fill(~case.mask, NEVER_SAMPLED), loss, temperature=case.temperature)
    return Answer(out.per_token.loss, gradient(out.loss_sum, logits).grad)


def chord(case: Case, preset: str, **options) -> Answer:
    shares = {"source": Source(share=1 - MU), "expert": Source(share=MU)}
    return ours.loss(case, "chord", preset=preset, **shares, **ours.CLIPS, **NO_DUAL, **options)


def kl_weighed_too(case: Case) -> Answer:
    """The rollout weight on the coefficient, which multiplies the KL as well."""
    ratio = (case.old_logp - case.rollout_logp).exp().clamp(max=2.0)
    return mine(kl=0.1, weight=ratio)(case)


def geometric(mode: str):
    """sequence_weight of mean log-ratios: both log-probabilities divided by the tokens of the answer."""

    def side(case: Case) -> Answer:
        tokens = case.mask.sum(1, keepdim=True).clamp(min=1)
        weight = ours.sequence_weights(case, mode, 1.1, new=case.old_logp / tokens, old=case.rollout_logp / tokens)
        if mode == "sequence_mask":  # kept answers weigh by their tokens' ratios
            weight = (weight > 0) * (case.old_logp - case.rollout_logp).exp()
        return mine(weight=weight)(case)

    return side


def gspo_whole(case: Case) -> Answer:
    return ours.loss(case, "gspo", source=SEQUENCE, **ours.CLIPS)


def opsm(case: Case, trainers_own: bool) -> Answer:
    """Dropped answers are out of the mask before anything is counted, as losses/advantages.py says."""
    keep = ours.sequence_weights(case, "opsm", 0.05, new=None if trainers_own else swift.logp_of(case, case.logits)) > 0
    return mine()(ours.with_mask(case, case.mask & keep))


def clamped_kl(stats, inputs) -> TokenTerms:
    """grpo, and 0.1 of k3 whose value is held to 10."""
    policy = clipped_policy_gradient("grpo", stats, inputs, **ours.CLIPS, **NO_DUAL)
    return policy._replace(loss=policy.loss + 0.1 * kl_estimate(stats.logp, inputs.require("ref_logp", "clamped_kl"), "k3").clamp(-10, 10))


def far_reference(kind: str, dtype: torch.dtype) -> Case:
    case = make_case(kind, dtype)
    ref = case.ref_logp.clone()
    ref[0, 1] = swift.logp_of(case, case.logits)[0, 1] + 4.0
    return replace(case, ref_logp=ref)


TOKENS = [
    Cell("per_token_loss_func", "sft, each token", swift.per_token(False), partial(each_token, loss="sft"), dtypes=SINGLE, inputs=WITH_GAP),
    Cell("per_token_loss_func, enable_dft_loss", "dft, each token", swift.per_token(True), partial(each_token, loss="dft"), dtypes=SINGLE,
         inputs=WITH_GAP),
    Cell("MegatronTrainer.loss_func", "sft, token mean", swift.megatron(False), mine("sft"), dtypes=SINGLE),
    Cell("MegatronTrainer.loss_func, enable_dft_loss", "dft, token mean", swift.megatron(True), mine("dft"), dtypes=SINGLE),
]  # fmt: skip

CHORD = [
    Cell("compute_chord_loss", 'chord, preset="phi", dual_clip=inf', swift.chord(MU, True), partial(chord, preset="phi"), preset="phi", dtypes=SINGLE),
    Cell("compute_chord_loss, chord_enable_phi_function=False", 'chord, preset="mu", dual_clip=inf', swift.chord(MU, False), partial(chord, preset="mu"),
         preset="mu", dtypes=SINGLE),
    Cell("compute_chord_loss, two micro-batches", 'chord, preset="phi", counts of the step', swift.chord(MU, True, HALVES),
         partial(chord, preset="phi", micro=HALVES), dtypes=SINGLE, why="divided by the micro-batch's own tokens, then averaged",
         switched=partial(chord, preset="phi", micro=HALVES, local=(0.5, 0.5)), how="count_step of each micro-batch"),
    *mu_cells("mu_schedule_function", swift.swift.mu),
]  # fmt: skip

POLICY = [
    Cell(f"{GRPO}, dapo", "grpo, dual_clip=inf, token mean", theirs(), mine(), inputs=WITH_GAP),
    Cell(f"{GRPO}, dapo, two micro-batches", "grpo, counts of the step", swift.theirs_in_two("dapo"), mine(micro=HALVES)),
    Cell(f"{GRPO}, bnpo, two micro-batches", "grpo, counts of the step", swift.theirs_in_two("bnpo"), mine(micro=HALVES),
         why="mean of the token means of micro-batches", switched=mine(micro=HALVES, local=(0.5, 0.5)), how="count_step of each micro-batch"),
    Cell(f"{GRPO}, bnpo", "grpo, dual_clip=inf, token mean", theirs(loss_type="bnpo"), mine(), inputs=WITH_GAP),
    Cell(f"{GRPO}, grpo", 'grpo, Source(denominator="sequence")', theirs(loss_type="grpo"), mine("grpo", SEQUENCE)),
    Cell(f"{GRPO}, grpo, empty answers", 'grpo, Source(denominator="sequence")', theirs(loss_type="grpo"), mine("grpo", SEQUENCE), inputs=("gap",),
         why="an answer without a trained token counts as a sequence", switched=live_over_all(SEQUENCE, **NO_DUAL),
         how="coefficients x live / all sequences"),
    Cell(f"{GRPO}, dr_grpo", 'grpo, Source(denominator="constant", constant=max_completion_length)', theirs(loss_type="dr_grpo"),
         mine("grpo", CONSTANT)),
    Cell(f"{GRPO}, dapo, delta=4", "grpo, dual_clip=4", theirs(delta=4.0), mine(dual_clip=4.0)),
    Cell(f"{GRPO}, cispo, epsilon_high=5", "cispo, clip_low=1, clip_high=4", theirs(loss_type="cispo", epsilon_high=5.0), mine("cispo")),
    Cell(f'{GRPO}, grpo, importance_sampling_level="sequence"', 'gspo, Source(denominator="sequence")',
         theirs(loss_type="grpo", importance_sampling_level="sequence"), gspo_whole),
    Cell(f'{GRPO}, grpo, importance_sampling_level="sequence_token"', 'gspo, Source(denominator="sequence")',
         theirs(loss_type="grpo", importance_sampling_level="sequence_token"), gspo_whole),
    Cell(f"{GRPO}, dapo, beta=0.1", 'grpo, kl=0.1, kl_estimator="k3"', theirs(beta=0.1), mine(kl=0.1)),
    Cell(f"{GRPO}, dapo, beta=0.1, k3 beyond 10", 'grpo, kl=0.1, kl_estimator="k3"', theirs(beta=0.1), mine(kl=0.1), make=far_reference,
         inputs=("plain",), said="plain, one ref_logp", why="the value is held to 10, and has no gradient from there on",
         switched=ours.mine(clamped_kl), how="a loss of two lines on grpo's terms"),
]  # fmt: skip

MISMATCH = [
    Cell(f"{RATIO}=token_truncate, 2.0", "grpo, tis=2", theirs(rollout_importance_sampling_mode="token_truncate"), mine(tis=2.0)),
    Cell(f"{RATIO}=token_mask, 2.0", "grpo, icepop_high=2", theirs(rollout_importance_sampling_mode="token_mask"), mine(icepop_high=2.0)),
    Cell(f"{RATIO}=token_truncate, beta=0.1", "grpo, tis=2, kl=0.1", theirs(rollout_importance_sampling_mode="token_truncate", beta=0.1),
         mine(tis=2.0, kl=0.1), why="the rollout weight multiplies the KL too", switched=kl_weighed_too, how="the weight in the coefficient"),
    *(Cell(f"{RATIO}={theirs_is}, 1.1", f'sequence_weight(mode="{ours_is}", bound=1.1)',
           theirs(rollout_importance_sampling_mode=theirs_is, rollout_importance_sampling_threshold=1.1),
           ours.by_sequence(ours_is, 1.1, **NO_DUAL), why=why, switched=geometric(ours_is), how=how)
      for theirs_is, ours_is, why, how in (
          ("sequence_truncate", "sequence_tis", "the geometric mean of an answer's ratios, not their product", "log-probabilities / tokens"),
          ("sequence_mask", "sequence_mask", "the geometric mean decides, and kept tokens weigh by their own ratio",
           "log-probabilities / tokens, and the ratio of each token"))),
    Cell(f"{GRPO}, off_policy_sequence_mask_delta=0.05", 'sequence_weight(mode="opsm", bound=0.05), dropped answers out of the mask',
         theirs(off_policy_sequence_mask_delta=0.05, loss_type="bnpo"), partial(opsm, trainers_own=True),
         why="the policy after the update is compared with the engine's, not the trainer's before it",
         switched=partial(opsm, trainers_own=False), how="logp for old_logp"),
]  # fmt: skip

ADVANTAGES = group_cells("compute_advantages, scale_rewards", {s: partial(swift.advantages, scale=s) for s in ("group", "batch", "none")}, eps=1e-4,
                         one_keeps=False)  # fmt: skip

CELLS = [*TOKENS, *CHORD, *POLICY, *MISMATCH, *ADVANTAGES]
NOT_COMPARED = ("sapo, real, fipo, sdar", "rloo, reinforce_plus_plus, gdpo", "top_entropy_quantile: ours has no such loss or option")
HOW = "functions and methods cut out of their files by the syntax tree; `swift.trainers` is a stub that holds their own per_token_loss_func; the " \
      "trainer around the methods is a stand-in with its defaults, its metrics are left out"  # fmt: skip
