"""Trinity-RFT's cells.  How its code is called is in trinity_peer.py."""

from __future__ import annotations

from functools import partial

import torch

from megatron_plugin import TokenTerms
from megatron_plugin.losses.chord import chord_phi
from megatron_plugin.parallel.normaliser import Source
from tests.parity import ours
from tests.parity import trinity_peer as trinity
from tests.parity.advantages import group_cells
from tests.parity.case import Case
from tests.parity.cell import Cell
from tests.parity.ours import ALL, HALVES, SEQUENCE, SUMS, Answer, by_sequence, mine, term_alone
from tests.parity.schedule import mu_cells

MU = 0.3
PPO = {"clip_range_low": 0.2, "clip_range_high": 0.28}


def chord(case: Case, preset: str, **options) -> Answer:
    return ours.loss(case, "chord", preset=preset, source=Source(share=1 - MU), expert=Source(share=MU), **ours.CLIPS | options)


def by_samples(case: Case, preset: str) -> Answer:
    """Each micro-batch's token means, weighed by its share of the step's samples of that kind: a step of its own with other shares."""
    total = None
    for part in HALVES:
        expert, size = float(case.expert[part].sum()), len(case.labels[part])
        shares = {"expert": MU * expert / float(case.expert.sum()), "source": (1 - MU) * (size - expert) / float((~case.expert).sum())}
        found = ours.loss(case.rows(part), "chord", preset=preset, **{k: Source(share=v) for k, v in shares.items()}, **ours.CLIPS)
        grad = torch.zeros_like(case.logits)
        grad[part] = found.grad
        total = Answer(found.value, grad) if total is None else Answer(total.value + found.value, total.grad + grad)
    return total


def phi_below_half(stats, inputs) -> TokenTerms:
    """chord_phi whose log p is held to log 0.5, as cutoff_prob=0.5: its weight as it was, no gradient above."""
    weight = chord_phi(stats, inputs).weight
    return TokenTerms(-weight * stats.logp.clamp(max=-0.6931471805599453), weight)


def own_entropy(case: Case) -> Answer:
    """Of the answers alone: demonstrations masked, as a loss of theirs that leaves them out."""
    kept = case.mask & ~case.expert[:, None]
    return term_alone(entropy_bonus=0.1)(ours.with_mask(case, kept))


SFT = [
    Cell("SFTLossFn", "sft", trinity.policy("SFTLossFn"), mine("sft")),
    Cell("SFTISLossFn", "sft_is", trinity.policy("SFTISLossFn"), mine("sft_is")),
    Cell("SFTPhiLossFn", "chord_phi", trinity.policy("SFTPhiLossFn"), mine("chord_phi")),
    Cell("SFTPhiLossFn, seq-mean-token-mean", 'chord_phi, Source(denominator="sequence")',
         trinity.policy("SFTPhiLossFn", loss_agg_mode="seq-mean-token-mean"), mine("chord_phi", SEQUENCE)),
    Cell("SFTPhiLossFn, cutoff_prob=0.5", "chord_phi", trinity.policy("SFTPhiLossFn", cutoff_prob=0.5), mine("chord_phi"),
         why="log p is held to log(cutoff_prob): no gradient above it", switched=mine(phi_below_half), how="a loss of two lines on chord_phi's weight"),
]  # fmt: skip

CHORD = [
    Cell("MIXCHORDPolicyLossFn, one micro-batch", 'chord, preset="trinity", Source(share=mu), Source(share=1 - mu)', trinity.mixed((ALL,), MU),
         partial(chord, preset="trinity"), preset="trinity"),
    Cell("MIXCHORDPolicyLossFn, enable_phi_function=False", 'chord, preset="mu"', trinity.mixed((ALL,), MU, enable_phi_function=False),
         partial(chord, preset="mu"), preset="mu"),
    Cell("MIXCHORDPolicyLossFn, two micro-batches", 'chord, preset="trinity", counts of the step', trinity.mixed(HALVES, MU),
         partial(chord, preset="trinity", micro=HALVES), why="token means of micro-batches, averaged by samples",
         switched=partial(by_samples, preset="trinity"), how="count_step of each micro-batch, shares by samples"),
    Cell("MIXPolicyLossFn, mu=0.3", 'chord, preset="mu"', trinity.mixed((ALL,), MU, "MIXPolicyLossFn"), partial(chord, preset="mu")),
    *mu_cells("mu_schedule_function", trinity.trinity.mu_schedule_function),
]  # fmt: skip

POLICY = [
    Cell("PPOPolicyLossFn", "grpo", trinity.policy("PPOPolicyLossFn", **PPO), mine()),
    Cell("PPOPolicyLossFn, seq-mean-token-mean", 'grpo, Source(denominator="sequence")',
         trinity.policy("PPOPolicyLossFn", loss_agg_mode="seq-mean-token-mean", **PPO), mine("grpo", SEQUENCE)),
    Cell("PPOPolicyLossFn, seq-mean-token-sum", 'grpo, Source(denominator="constant", constant=1)',
         trinity.policy("PPOPolicyLossFn", loss_agg_mode="seq-mean-token-sum", **PPO), mine("grpo", SUMS)),
    Cell("PPOPolicyLossFn, seq-mean-token-mean, empty answers", 'grpo, Source(denominator="sequence")',
         trinity.policy("PPOPolicyLossFn", loss_agg_mode="seq-mean-token-mean", **PPO), mine("grpo", SEQUENCE), inputs=("gap",),
         why="an answer without a trained token counts as a sequence", switched=ours.live_over_all(SEQUENCE), how="coefficients x live / all sequences"),
    Cell("PPOPolicyLossFn, seq-mean-token-sum-norm", 'grpo, Source(denominator="constant")',
         trinity.policy("PPOPolicyLossFn", loss_agg_mode="seq-mean-token-sum-norm", **PPO), mine("grpo", ours.CONSTANT),
         why="the sum is divided by the places, not by the sequences too", switched=lambda case: mine("grpo", ours.CONSTANT,
         weight=torch.full(case.labels.shape, float(len(case.labels))))(case), how="coefficients x sequences"),
    Cell("PPOPolicyLossFn, fallback_to_policy_gradient", "grpo without old_logp",
         trinity.policy("PPOPolicyLossFn", fallback_to_policy_gradient=True, **PPO), mine(given={"old_logp": None})),
    Cell("PPOPolicyLossFn, enable_sequence_masking, 0.05", 'sequence_weight(mode="opsm", bound=0.05)',
         trinity.policy("PPOPolicyLossFn", enable_sequence_masking=True, delta_sequence_masking=0.05, **PPO), by_sequence("opsm", 0.05),
         why="p_old and p are compared, not the engine's policy and p_old",
         switched=lambda case: mine(weight=ours.sequence_weights(case, "opsm", 0.05, new=trinity.logp_of(case, case.logits), old=case.old_logp))(case),
         how="logp for old_logp, old_logp for rollout_logp"),
    Cell("GSPOLossFn", 'gspo, Source(denominator="sequence")', trinity.policy("GSPOLossFn", **PPO), mine("gspo", SEQUENCE, **ours.CLIPS)),
    Cell("GSPOLossFn, 3e-4 and 4e-4", 'gspo, its defaults, Source(denominator="sequence")',
         trinity.policy("GSPOLossFn", clip_range_low=3e-4, clip_range_high=4e-4), mine("gspo", SEQUENCE)),
    Cell("CISPOPolicyLossFn", "cispo, clip_low=1, clip_high=0.28", trinity.policy("CISPOPolicyLossFn"), mine("cispo", clip_high=0.28)),
    *(Cell(f"{name}.calculate_kl_loss", f'grpo, kl=0.5, kl_estimator="{ours_is}", its term alone', trinity.kl(name),
           term_alone(kl=0.5, kl_estimator=ours_is)) for name, ours_is in (("K1Fn", "k1"), ("K2Fn", "k2"), ("K3Fn", "k3"), ("LowVarKLFn", "k3"))),
    Cell("DefaultEntropyLossFn", "grpo, entropy_bonus=0.1, its term alone", trinity.entropy(mixed=False), term_alone(entropy_bonus=0.1)),
    Cell("MixEntropyLossFn", "the same on own answers", trinity.entropy(mixed=True), own_entropy),
]  # fmt: skip

ADVANTAGES = group_cells("GRPOGroupedAdvantage", {s: partial(trinity.advantages, scale=s) for s in ("group", "batch")}, eps=1e-6, one_keeps=True)

CELLS = [*SFT, *CHORD, *POLICY, *ADVANTAGES]
NOT_COMPARED = ("sapo, rec, topr, opmd, sppo", "enable_mask_clip of CISPO", "CorrectedK3Fn, AbsFn", "rank_penalty",
                "advantages other than GRPO's: ours has no such loss or option")  # fmt: skip
HOW = "classes cut out of their files by the syntax tree: the package does not import without Ray and vLLM; experiences are stand-ins with a " \
      "task, a reward and a mask"  # fmt: skip
