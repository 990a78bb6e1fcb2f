"""TRL, from the installed package: what its trainers compute from logits, with a stand-in for the trainer around it."""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

from megatron_plugin.losses import grpo
from tests.parity import ours
from tests.parity.case import Case, S, make_case
from tests.parity.ours import HALVES, Answer, gradient, leaf
from tests.parity.source import statements

EPSILON = {"epsilon_low": 0.2, "epsilon_high": 0.28}
CLIPS = {"dual_clip": float("inf")}
"""On top of ours.CLIPS: TRL has no dual clip unless delta is set."""


def trainer(**changed):
    """What GRPOTrainer._compute_loss reads of itself, at GRPOConfig's defaults but for what is named."""
    own = dict(
        loss_type="dapo", beta=0.0, importance_sampling_level="token", use_vllm=False, vllm_importance_sampling_correction=True,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, current_gradient_accumulation_steps=1,
        max_completion_length=S, _entropy_bonus_enabled=False, use_adaptive_entropy=False, entropy_coef=0.0,
        model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)), **EPSILON,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
    )  # fmt: skip
    arguments = dict(delta=None, use_bias_correction_kl=True, steps_per_generation=1)
    arguments |= {name: changed.pop(name) for name in list(changed) if name in arguments}
    return SimpleNamespace(**own | changed, args=SimpleNamespace(**arguments))


def compute_loss(case: Case, logits: Tensor, self, **batch: Tensor) -> Tensor:
    """_compute_loss on one micro-batch whose model gives these logits."""
    self._get_per_token_logps_and_entropies = lambda *_, **__: (
        *selective_log_softmax_and_entropy(logits, case.labels, temperature=case.temperature), None)  # fmt: skip
    given = {"prompt_ids": case.labels[:, :0], "prompt_mask": case.labels[:, :0], "completion_ids": case.labels,
             "completion_mask": case.mask.to(case.dtype), "advantages": case.advantage, "old_per_token_logps": case.old_logp,
             "ref_per_token_logps": case.ref_logp, "num_items_in_batch": case.mask.sum()}  # fmt: skip
    return GRPOTrainer._compute_loss(self, None, given | batch)


def theirs(old: bool = True, **changed):
    def peer(case: Case) -> Answer:
        logits = leaf(case)
        return gradient(compute_loss(case, logits, trainer(**changed), **({} if old else {"old_per_token_logps": None})), logits)

    return peer


def theirs_in_two(loss_type: str):
    """Two micro-batches of a step, each told the step's tokens, or dividing by its own."""

    def peer(case: Case) -> Answer:
        logits = leaf(case)
        self = {"current_gradient_accumulation_steps": 2, "steps_per_generation": 2, "loss_type": loss_type}
        parts = [compute_loss(case.rows(part), logits[part], trainer(**self), num_items_in_batch=case.mask.sum()) for part in HALVES]
        return gradient(sum(parts), logits)

    return peer


def sft(loss_type: str):
    """SFTTrainer.compute_loss, whose model returns what its fused head computes."""

    def peer(case: Case) -> Answer:
        logits = leaf(case)
        log_probs = selective_log_softmax(logits, case.labels, temperature=case.temperature).masked_fill(~case.mask, 0)
        found = SimpleNamespace(log_probs=log_probs, label_mask=case.mask, entropy=log_probs, is_top1=case.mask)
        self = SimpleNamespace(
            model=SimpleNamespace(training=True), aux_loss_enabled=False, compute_loss_func=None, label_smoother=None, _total_train_tokens=0,
            args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False), _metrics=defaultdict(lambda: defaultdict(list)),
            accelerator=SimpleNamespace(parallelism_config=None, num_processes=1, gather_for_metrics=lambda x: x), _tp_size=1,
        )  # fmt: skip
        batch = {"labels": case.labels, "attention_mask": case.mask}
        return gradient(SFTTrainer.compute_loss(self, lambda **_: found, batch, num_items_in_batch=case.mask.sum()), logits)

    return peer


def rollout_ratio(case: Case, mode: str, low: float | None, high: float) -> Tensor:
    """The lines of _generate_and_score_completions that weigh vLLM's tokens."""
    self = SimpleNamespace(use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode,
                           vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high)  # fmt: skip
    names = {"self": self, "completion_mask": case.mask, "tool_mask": None, "old_per_token_logps": case.old_logp,
             "sampling_per_token_logps": case.rollout_logp}  # fmt: skip
    return WEIGH(names)["vllm_importance_sampling_ratio"]


def _weighs(node: ast.stmt) -> bool:
    """`if self.use_vllm and ...:` in whose body the ratio is made."""
    return isinstance(node, ast.If) and ast.unparse(node.test).startswith("self.use_vllm") and any(
        isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "vllm_importance_sampling_ratio" for x in node.body)  # fmt: skip


def _normalises(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "self.multi_objective_aggregation == 'sum_then_normalize'"


WEIGH = statements(GRPOTrainer._generate_and_score_completions, _weighs)
NORMALISE = statements(GRPOTrainer._generate_and_score_completions, _normalises)


def advantages(rewards: Tensor, scale: str) -> Tensor:
    """The lines of _generate_and_score_completions that make advantages of rewards."""
    self = SimpleNamespace(multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.ones(1, dtype=rewards.dtype))
    each = rewards.reshape(-1, 1)
    names = {"self": self, "rewards_per_func": each, "unscorable_mask": each.isnan().all(1), "num_generations": rewards.shape[1], "device": "cpu"}
    return NORMALISE(names)["advantages"].view_as(rewards)


def weighed(mode: str, high: float, low: float | None = None):
    """dapo with vLLM's ratio in one of its modes."""

    def peer(case: Case) -> Answer:
        logits = leaf(case)
        ratio = rollout_ratio(case, mode, low, high)
        return gradient(compute_loss(case, logits, trainer(use_vllm=True), importance_sampling_ratio=ratio), logits)

    return peer


def with_nan(case: Case) -> Case:
    rollout = case.rollout_logp.clone()
    rollout[0, 0] = rollout[4, 2] = torch.nan
    return replace(case, rollout_logp=rollout)


def nan_as_old(case: Case) -> Answer:
    case = with_nan(case)
    known = case.rollout_logp.isfinite()
    return ours.mine(given={"rollout_logp": torch.where(known, case.rollout_logp, case.old_logp)}, tis=2.0, **CLIPS)(case)


def far_ratio(kind: str, dtype: torch.dtype) -> Case:
    """One wrong token that has become e^21 times as likely as it was: without a dual clip nothing else bounds its loss."""
    case = make_case(kind, dtype)
    logp = case.logits.div(case.temperature).log_softmax(-1).gather(-1, case.labels[..., None])[..., 0]
    old = case.old_logp.clone()
    old[0, 0] = logp[0, 0] - 21.0
    return replace(case, old_logp=old)


def unbounded_ratio(case: Case) -> Answer:
    with mock.patch.object(grpo, "LOG_RATIO_MAX", float("inf")):
        return ours.mine(**CLIPS)(case)


def high_logits(kind: str, dtype: torch.dtype) -> Case:
    case = make_case(kind, dtype)
    return replace(case, logits=case.logits + 9000.0)
