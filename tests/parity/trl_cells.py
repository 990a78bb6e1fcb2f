"""TRL's cells.  How its functions are called is in trl_peer.py."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from trl import __version__ as trl_version
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from megatron_plugin import TokenTerms, token_stats
from megatron_plugin.losses.grpo import clipped_policy_gradient
from megatron_plugin.losses.kl import kl_estimate
from tests.parity import ours
from tests.parity import trl_peer as trl
from tests.parity.advantages import group_cells
from tests.parity.case import Case
from tests.parity.cell import Cell
from tests.parity.ours import CONSTANT, HALVES, SEQUENCE, SUMS, Answer, gradient, leaf, live_over_all
from tests.parity.trl_peer import CLIPS, theirs

GRPO = "GRPOTrainer._compute_loss"
RATIO = "GRPOTrainer, vllm_importance_sampling_mode"
ALL_KINDS = ("plain", "ugly", "hot", "gap")


def mine(name="grpo", *source, **options):
    return ours.mine(name, *source, **(CLIPS if name == "grpo" else {}) | options)


def log_softmax(case: Case) -> Answer:
    logits = leaf(case)
    return gradient(selective_log_softmax(logits, case.labels, temperature=case.temperature), logits)


def entropy(case: Case) -> Answer:
    logits = leaf(case)
    return gradient(entropy_from_logits(logits / case.temperature), logits)


def z_minus_lse(case: Case) -> Answer:
    """logp as the difference of two large fp32 numbers, the second of them ours."""
    lse = token_stats(case.logits.double(), case.labels, temperature=case.temperature).lse.float()
    return Answer(case.logits.gather(-1, case.labels[..., None])[..., 0] / case.temperature - lse)


def in_bf16(case: Case) -> Answer:
    return Answer(selective_log_softmax(case.logits.bfloat16(), case.labels).float())


def in_fp32(case: Case) -> Tensor:
    """Ours, of the same bf16 logits."""
    return token_stats(case.logits.bfloat16(), case.labels).logp


def opsm(case: Case, trainers_own: bool) -> Answer:
    """p in the place of p_old, as TRL, Trinity and slime have it, or ours: the trainer's policy before the update."""
    now = case.logits.div(case.temperature).log_softmax(-1).gather(-1, case.labels[..., None])[..., 0]
    return mine(weight=ours.sequence_weights(case, "opsm", 0.05, new=None if trainers_own else now))(case)


def opsm_peer(case: Case) -> Answer:
    logits = leaf(case)
    batch = {"sampling_per_token_logps": case.rollout_logp}
    return gradient(trl.compute_loss(case, logits, trl.trainer(off_policy_mask_threshold=0.05), **batch), logits)


def kl_by_ratio(stats, inputs) -> TokenTerms:
    """grpo, and 0.1 of k3 times p / p_old."""
    policy = clipped_policy_gradient("grpo", stats, inputs, **ours.CLIPS, **CLIPS)
    ratio = (stats.logp - inputs.require("old_logp", "kl_by_ratio")).exp()
    return policy._replace(loss=policy.loss + 0.1 * ratio * kl_estimate(stats.logp, inputs.require("ref_logp", "kl_by_ratio"), "k3"))


def nan_peer(case: Case) -> Answer:
    return trl.weighed("token_truncate", 2.0)(trl.with_nan(case))


STATS = [
    Cell("selective_log_softmax", "token_stats(...).logp", log_softmax, partial(ours.stats, column="logp")),
    Cell("selective_log_softmax, logits of 9000", "token_stats(...).logp", lambda case: Answer(log_softmax(case).value),
         lambda case: Answer(ours.stats(case, "logp").value), make=trl.high_logits, inputs=("plain",), said="plain + 9000", dtypes=(torch.float32,),
         why="it forms logp as z - lse in fp32", switched=z_minus_lse, how="z - lse, with token_stats(fp64 logits).lse rounded to fp32"),
    Cell("selective_log_softmax, bf16 logits", "token_stats(...).logp, fp32", in_bf16, lambda case: Answer(in_fp32(case)), dtypes=(torch.float32,),
         bound=2.0**-7, note="one bf16 ulp: theirs stays in bf16, ours of bf16 logits is fp32"),
    Cell("entropy_from_logits", "token_stats(...).entropy", entropy, partial(ours.stats, column="entropy")),
    Cell('SFTTrainer.compute_loss, loss_type="nll"', 'token_loss(..., "sft"), token mean', trl.sft("nll"), mine("sft"), inputs=ALL_KINDS),
    Cell('SFTTrainer.compute_loss, loss_type="dft"', 'token_loss(..., "dft"), token mean', trl.sft("dft"), mine("dft"), inputs=ALL_KINDS),
]  # fmt: skip

POLICY = [
    Cell(f"{GRPO}, dapo", "grpo, dual_clip=inf, token mean", theirs(loss_type="dapo"), mine(), inputs=ALL_KINDS),
    Cell(f"{GRPO}, dapo, strictly on-policy", "grpo without old_logp", theirs(old=False), mine(given={"old_logp": None})),
    Cell(f"{GRPO}, dapo, two micro-batches", "grpo, counts of the step", trl.theirs_in_two("dapo"), mine(micro=HALVES)),
    Cell(f"{GRPO}, bnpo", "grpo, dual_clip=inf, token mean", theirs(loss_type="bnpo"), mine(), inputs=ALL_KINDS),
    Cell(f"{GRPO}, bnpo, two micro-batches", "grpo, counts of the step", trl.theirs_in_two("bnpo"), mine(micro=HALVES),
         why="mean of the token means of micro-batches", switched=mine(micro=HALVES, local=(0.5, 0.5)), how="count_step of each micro-batch"),
    Cell(f"{GRPO}, grpo", 'grpo, Source(denominator="sequence")', theirs(loss_type="grpo"), mine("grpo", SEQUENCE)),
    Cell(f"{GRPO}, grpo, two micro-batches", 'grpo, Source(denominator="sequence")', trl.theirs_in_two("grpo"), mine("grpo", SEQUENCE, micro=HALVES)),
    Cell(f"{GRPO}, grpo, empty answers", 'grpo, Source(denominator="sequence")', theirs(loss_type="grpo"), mine("grpo", SEQUENCE), inputs=("gap",),
         why="an answer without a trained token counts as a sequence", switched=live_over_all(SEQUENCE, **CLIPS),
         how="coefficients x live / all sequences"),
    Cell(f"{GRPO}, dr_grpo", 'grpo, Source(denominator="constant", constant=max_completion_length)', theirs(loss_type="dr_grpo"), mine("grpo", CONSTANT)),
    Cell(f"{GRPO}, dr_grpo, empty answers", 'grpo, Source(denominator="constant")', theirs(loss_type="dr_grpo"), mine("grpo", CONSTANT), inputs=("gap",),
         why="an answer without a trained token counts as a sequence", switched=live_over_all(CONSTANT, **CLIPS),
         how="coefficients x live / all sequences"),
    Cell(f"{GRPO}, dapo, delta=4", "grpo, dual_clip=4", theirs(delta=4.0), mine(dual_clip=4.0)),
    Cell(f"{GRPO}, dapo, ratio of e^21", "grpo, dual_clip=inf", theirs(), mine(), make=trl.far_ratio, inputs=("plain",), said="plain, one old_logp",
         why="the log-ratio is not held to +-20 nats", switched=trl.unbounded_ratio, how="LOG_RATIO_MAX = inf"),
    Cell(f"{GRPO}, dapo, beta=0.1, use_bias_correction_kl=False", 'grpo, kl=0.1, kl_estimator="k3"',
         theirs(beta=0.1, use_bias_correction_kl=False), mine(kl=0.1)),
    Cell(f"{GRPO}, dapo, beta=0.1 (use_bias_correction_kl=True is the default)", 'grpo, kl=0.1, kl_estimator="k3"',
         theirs(beta=0.1), mine(kl=0.1), why="the KL is multiplied by the ratio, differentiated through both",
         switched=ours.mine(kl_by_ratio), how="a loss of two lines on grpo's terms and kl_estimate"),
    Cell(f"{GRPO}, dapo, entropy_coef=0.01", "grpo, entropy_bonus=0.01", theirs(_entropy_bonus_enabled=True, entropy_coef=0.01),
         mine(entropy_bonus=0.01)),
    Cell(f"{GRPO}, cispo, epsilon_high=5", "cispo, clip_low=1, clip_high=4", theirs(loss_type="cispo", epsilon_high=5.0), mine("cispo")),
    Cell(f'{GRPO}, grpo, importance_sampling_level="sequence" (GSPO)', 'gspo, Source(denominator="sequence")',
         theirs(loss_type="grpo", importance_sampling_level="sequence"), mine("gspo", SEQUENCE, **ours.CLIPS)),
    Cell(f"{GRPO}, grpo, sequence level, epsilon 3e-4 and 4e-4", 'gspo, its defaults, Source(denominator="sequence")',
         theirs(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4), mine("gspo", SEQUENCE)),
    Cell(f"{GRPO}, luspo, sequence level", 'gspo, Source(denominator="constant", constant=1)',
         theirs(loss_type="luspo", importance_sampling_level="sequence"), mine("gspo", SUMS, **ours.CLIPS)),
]  # fmt: skip

MISMATCH = [
    Cell(f"{RATIO}=token_truncate, 2.0", "grpo, tis=2", trl.weighed("token_truncate", 2.0), mine(tis=2.0)),
    Cell(f"{RATIO}=token_mask, 0.5 to 2.0", "grpo, icepop_low=0.5, icepop_high=2", trl.weighed("token_mask", 2.0, 0.5),
         mine(icepop_low=0.5, icepop_high=2.0)),
    Cell(f"{RATIO}=sequence_truncate, 3.0", 'sequence_weight(mode="sequence_tis", bound=3)', trl.weighed("sequence_truncate", 3.0),
         ours.by_sequence("sequence_tis", 3.0, **CLIPS)),
    Cell(f"{RATIO}=sequence_mask, 3.0 (default)", 'sequence_weight(mode="sequence_mask", bound=3)', trl.weighed("sequence_mask", 3.0),
         ours.by_sequence("sequence_mask", 3.0, **CLIPS)),
    Cell(f"{RATIO}=token_truncate, NaN from vLLM", "grpo, tis=2", nan_peer, lambda case: mine(tis=2.0)(trl.with_nan(case)), inputs=("plain",),
         said="plain, two NaN", why="a token without rollout_logp has ratio 1; ours stays NaN, to be seen", switched=trl.nan_as_old,
         how="old_logp where rollout_logp is NaN"),
    Cell("GRPOTrainer.get_off_policy_mask, 0.05", 'sequence_weight(mode="opsm", bound=0.05)', opsm_peer, partial(opsm, trainers_own=True),
         why="the policy after the update is compared with the engine's, not the trainer's before it", switched=partial(opsm, trainers_own=False),
         how="logp for old_logp"),
]  # fmt: skip

ADVANTAGES = group_cells(
    "GRPOTrainer, scale_rewards", {scale: partial(trl.advantages, scale=scale) for scale in ("group", "batch", "none")}, eps=1e-4, one_keeps=False
)

CELLS = [*STATS, *POLICY, *MISMATCH, *ADVANTAGES]
NOT_COMPARED = ("sapo", "vespo", "top_entropy_quantile", "vllm_importance_sampling_clip_min of the truncating modes",
                "normalize_then_sum: ours has no such loss or option; dft_loss, which older versions had: this one computes it inside SFTTrainer.compute_loss, below")  # fmt: skip
VERSION = f"trl {trl_version}"
HOW = "imported from the installed package; the trainer around each method is a stand-in with GRPOConfig's defaults, " \
      "and the lines that make advantages and vLLM's ratio are cut out of their method by its syntax tree"  # fmt: skip
