"""verl's cells: verl/trainer/ppo/core_algos.py and what it calls, imported with its wheel on the Python path."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import numpy
import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits_naive, logprobs_from_logits_v2
from verl.workers.config import ActorConfig

from megatron_plugin import TokenTerms
from megatron_plugin.losses import gspo
from megatron_plugin.losses.kl import kl_estimate
from tests.parity import ours
from tests.parity.advantages import group_cells
from tests.parity.case import Case, make_case
from tests.parity.cell import Cell
from tests.parity.ours import CONSTANT, HALVES, SEQUENCE, SUMS, TOKEN, Answer, by_sequence, gradient, leaf, mine, term_alone

MODES = {"token-mean": TOKEN, "seq-mean-token-sum": SUMS, "seq-mean-token-mean": SEQUENCE, "seq-mean-token-sum-norm": CONSTANT}
NAMES = {"token-mean": "token mean", "seq-mean-token-sum": 'Source(denominator="constant", constant=1)',
         "seq-mean-token-mean": 'Source(denominator="sequence")', "seq-mean-token-sum-norm": 'Source(denominator="constant", constant=places)'}  # fmt: skip
WITH_GAP = ("plain", "ugly", "hot", "gap")


def actor(low: float = 0.2, high: float = 0.28, **counts) -> ActorConfig:
    config = ActorConfig(strategy="megatron", rollout_n=1, clip_ratio=0.2, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=3.0,
                         ppo_micro_batch_size_per_gpu=1, ppo_mini_batch_size=2)  # fmt: skip
    config.global_batch_info.update(counts)
    return config


def logp_of(case: Case, logits: Tensor) -> Tensor:
    return logprobs_from_logits_naive(logits / case.temperature, case.labels)


def policy(name: str, case: Case, logits: Tensor, mode: str, config: ActorConfig, weights: Tensor | None = None) -> Tensor:
    """A loss of verl's registry on one micro-batch."""
    return core_algos.get_policy_loss_fn(name)(
        old_log_prob=case.old_logp, log_prob=logp_of(case, logits), advantages=case.per_token(case.advantage),
        response_mask=case.mask.to(case.dtype), loss_agg_mode=mode, config=config, rollout_is_weights=weights,
    )[0]  # fmt: skip


def theirs(name: str, mode: str = "token-mean", rollout: tuple | None = None, **clips: float):
    """rollout: (level, threshold) of compute_rollout_correction_weights."""

    def peer(case: Case) -> Answer:
        logits, weights = leaf(case), None
        if rollout:
            log_ratio, mask = case.old_logp - case.rollout_logp, case.mask.to(case.dtype)
            weights, _ = compute_rollout_correction_weights(log_ratio, mask, *rollout)
        return gradient(policy(name, case, logits, mode, actor(**clips), weights), logits)

    return peer


def on_two_ranks(mode: str):
    """Two data-parallel ranks of a micro-batch each, told the global counts; their gradients are averaged, as DDP does."""

    def peer(case: Case) -> Answer:
        logits = leaf(case)
        counts = {"dp_size": 2, "batch_num_tokens": case.mask.sum(), "global_batch_size": case.mask.any(1).sum()}
        config = actor(**counts, loss_scale_factor=case.mask.shape[1])
        return gradient(sum(policy("vanilla", case.rows(part), logits[part], mode, config) for part in HALVES) / 2, logits)

    return peer


def kl_of(kind: str):
    def peer(case: Case) -> Answer:
        logits = leaf(case)
        kl = core_algos.kl_penalty(logp_of(case, logits), case.ref_logp, kind)
        return gradient(core_algos.agg_loss(kl, case.mask.to(case.dtype), "token-mean"), logits)

    return peer


def far_reference(kind: str, dtype: torch.dtype) -> Case:
    """One token whose reference finds it e^4 times as likely: k3 is 49.6 there."""
    case = make_case(kind, dtype)
    ref = case.ref_logp.clone()
    ref[0, 1] = logp_of(case, case.logits)[0, 1] + 4.0
    return replace(case, ref_logp=ref)


def k3_held(stats, inputs) -> TokenTerms:
    return TokenTerms(kl_estimate(stats.logp, inputs.require("ref_logp", "k3_held"), "k3").clamp(-10, 10))


def far_answer(kind: str, dtype: torch.dtype) -> Case:
    """A wrong answer of one token that has become e^12 times as likely."""
    case = make_case(kind, dtype)
    old = case.old_logp.clone()
    old[0] = logp_of(case, case.logits)[0] - 12.0
    return replace(case, old_logp=old)


def ten_nats(case: Case) -> Answer:
    with mock.patch.object(gspo, "LOG_RATIO_MAX", 10.0):
        return mine("gspo", SEQUENCE, **ours.CLIPS)(case)


def entropy(case: Case) -> Answer:
    logits = leaf(case)
    return gradient(entropy_from_logits(logits / case.temperature), logits)


def entropy_loss(case: Case) -> Answer:
    logits = leaf(case)
    return gradient(-core_algos.compute_entropy_loss(logits / case.temperature, case.mask.to(case.dtype)), logits)


def log_probs(function, case: Case) -> Answer:
    logits = leaf(case)
    return gradient(function(logits / case.temperature, case.labels), logits)


def advantages(rewards: Tensor, scale: str) -> Tensor:
    """compute_grpo_outcome_advantage of answers of one token."""
    index = numpy.arange(len(rewards)).repeat(rewards.shape[1])
    each = rewards.reshape(-1, 1)
    found, _ = core_algos.compute_grpo_outcome_advantage(each, torch.ones_like(each), index, norm_adv_by_std_in_grpo=scale == "group")
    return found.view_as(rewards)


STATS = [
    Cell("logprobs_from_logits_naive", "token_stats(...).logp", partial(log_probs, logprobs_from_logits_naive), partial(ours.stats, column="logp")),
    Cell("logprobs_from_logits_v2", "token_stats(...).logp", partial(log_probs, logprobs_from_logits_v2), partial(ours.stats, column="logp")),
    Cell("entropy_from_logits", "token_stats(...).entropy", entropy, partial(ours.stats, column="entropy")),
    Cell("compute_entropy_loss", "grpo, entropy_bonus=1, its term alone", entropy_loss, term_alone(entropy_bonus=1.0)),
]

LOSSES = [
    *(Cell(f"compute_policy_loss_vanilla, {mode}", f"grpo, {NAMES[mode]}", theirs("vanilla", mode), mine("grpo", source), inputs=WITH_GAP)
      for mode, source in MODES.items()),
    *(Cell(f"agg_loss, {mode}, dp_size=2, global counts", f"grpo, {NAMES[mode]}, counts of the step", on_two_ranks(mode),
           mine("grpo", source, micro=HALVES), inputs=WITH_GAP) for mode, source in MODES.items()),
    Cell("compute_policy_loss_vanilla, clip_ratio=0.2", "grpo, its defaults", theirs("vanilla", high=0.2), mine(clip_high=0.2)),
    Cell("compute_policy_loss_gspo, seq-mean-token-mean", 'gspo, Source(denominator="sequence")', theirs("gspo", "seq-mean-token-mean"),
         mine("gspo", SEQUENCE, **ours.CLIPS), inputs=WITH_GAP),
    Cell("compute_policy_loss_gspo, token-mean, 3e-4 and 4e-4", "gspo, its defaults", theirs("gspo", low=3e-4, high=4e-4), mine("gspo")),
    Cell("compute_policy_loss_gspo, a mean ratio of e^12", "gspo", theirs("gspo", "seq-mean-token-mean"), mine("gspo", SEQUENCE, **ours.CLIPS),
         make=far_answer, inputs=("plain", "ugly"), said="plain, ugly; old_logp of one answer", why="the mean log-ratio is held to 10 nats, ours to 20",
         switched=ten_nats, how="LOG_RATIO_MAX = 10"),
    Cell("compute_policy_loss_cispo", "cispo, clip_low=0.2, clip_high=0.28", theirs("cispo"), mine("cispo", **ours.CLIPS)),
    Cell("compute_policy_loss_gpg", "cispo without old_logp", theirs("gpg"), mine("cispo", given={"old_logp": None})),
    Cell("vanilla, rollout_is=token, 2.0 (TIS)", "grpo, tis=2", theirs("vanilla", rollout=("token", 2.0)), mine(tis=2.0)),
    Cell("vanilla, rollout_is=token, 0.5_2.0 (IcePop)", "grpo, icepop_low=0.5, icepop_high=2", theirs("vanilla", rollout=("token", "0.5_2.0")),
         mine(icepop_low=0.5, icepop_high=2.0)),
    Cell("vanilla, rollout_is=sequence, 2.0", 'sequence_weight(mode="sequence_tis", bound=2)', theirs("vanilla", rollout=("sequence", 2.0)),
         by_sequence("sequence_tis", 2.0)),
]  # fmt: skip

KL = [
    *(Cell(f"kl_penalty, {kind}", f'grpo, kl=1, kl_estimator="{kind}", its term alone', kl_of(kind), term_alone(kl=1.0, kl_estimator=kind))
      for kind in ("k1", "k2", "k3", "k1+", "k3+")),
    Cell("kl_penalty, k3 beyond 10", 'grpo, kl=1, kl_estimator="k3", its term alone', kl_of("k3"), term_alone(kl=1.0, kl_estimator="k3"),
         make=far_reference, inputs=("plain",), said="plain, one ref_logp", why="the value is held to 10, and has no gradient from there on",
         switched=mine(k3_held), how="a loss of one line, kl_estimate(...).clamp(-10, 10)"),
]  # fmt: skip

ADVANTAGES = group_cells("compute_grpo_outcome_advantage", {s: partial(advantages, scale=s) for s in ("group", "none")}, eps=1e-6, one_keeps=True)

CELLS = [*STATS, *LOSSES, *KL, *ADVANTAGES]
NOT_COMPARED = ("sapo", "clip_cov", "kl_cov", "geo_mean", "dro", "dppo_tv", "dppo_kl", "token-sum", "kl_penalty abs", "rollout_is_batch_normalize",
                "advantages other than GRPO's: ours has no such loss or option")  # fmt: skip
HOW = "imported, with its wheel and those of tensordict, ray, msgpack, pyvers, codetiming and orjson on the Python path"
