"""ms-swift's losses, cut out of the files that hold them: its package does not import without modelscope, peft and a tokenizer's data stack.

One stub: `swift.trainers`, from which compute_chord_loss imports per_token_loss_func inside itself, holds that very function of theirs.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.case import NEVER_SAMPLED, Case, S
from tests.parity.ours import HALVES, Answer, gradient, leaf
from tests.parity.source import functions, method


def _load() -> SimpleNamespace:
    root = next(Path(place) / "swift" for place in sys.path if (Path(place) / "swift/rlhf_trainers").is_dir())
    per_token = functions(root / "trainers/utils.py", "per_token_loss_func").per_token_loss_func
    for name in ("swift", "swift.trainers"):
        sys.modules[name] = ModuleType(name)
    sys.modules["swift.trainers"].per_token_loss_func = per_token
    chord = functions(root / "rlhf_trainers/utils.py", "mu_schedule_function", "compute_chord_loss", to_device=lambda x, device: x)
    file = root / "rlhf_trainers/grpo_trainer.py"
    window = functions(file, "WINDOW_NORMALIZED_LOSS_TYPES").WINDOW_NORMALIZED_LOSS_TYPES
    known = dict(WINDOW_NORMALIZED_LOSS_TYPES=window, compute_chord_loss=chord.compute_chord_loss, gather_object=list,
                 nanmax=torch.max, nanmin=torch.min)  # fmt: skip
    names = ("_compute_loss_and_metrics", "_undo_gradient_accumulation_scaling", "_get_rollout_is_correction", "_compute_sequence_level_ratios",
             "_apply_rollout_importance_sampling", "_compute_off_policy_sequence_mask")  # fmt: skip
    methods = method(file, "GRPOTrainer", *names, **known)
    trainer = type("GRPOTrainer", (), {name: getattr(methods, name) for name in names})
    megatron = method(root / "megatron/trainers/trainer.py", "MegatronTrainer", "loss_func").loss_func
    nanstd = functions(root / "utils/torch_utils.py", "nanstd").nanstd
    advantages = functions(root / "rl_core/advantage.py", "compute_advantages", nanstd=nanstd).compute_advantages
    return SimpleNamespace(per_token=per_token, mu=chord.mu_schedule_function, trainer=trainer, megatron=megatron, advantages=advantages)


swift = _load()


def logp_of(case: Case, logits: Tensor) -> Tensor:
    return (logits / case.temperature).log_softmax(-1).gather(-1, case.labels[..., None])[..., 0]


def unshifted(case: Case, logits: Tensor) -> tuple[SimpleNamespace, Tensor]:
    """A model's output and labels as its collator makes them: one place more, label t + 1 against logits t, NEVER_SAMPLED first."""
    labels = case.labels.masked_fill(~case.mask, NEVER_SAMPLED)
    return SimpleNamespace(logits=F.pad(logits / case.temperature, (0, 0, 0, 1))), F.pad(labels, (1, 0), value=NEVER_SAMPLED)


def per_token(dft: bool):
    """per_token_loss_func on each place, [b, s]."""

    def peer(case: Case) -> Answer:
        logits = leaf(case)
        outputs, labels = unshifted(case, logits)
        loss = swift.per_token(outputs, labels, enable_dft_loss=dft).view(labels.shape)[:, :-1]
        return gradient(loss, logits)

    return peer


def megatron(dft: bool):
    """MegatronTrainer.loss_func on megatron-core's cross-entropy, divided once by the tokens that it returns."""

    def peer(case: Case) -> Answer:
        logits = leaf(case)
        self = SimpleNamespace(args=SimpleNamespace(enable_dft_loss=dft, enable_channel_loss=False))
        loss, count, _ = swift.megatron(self, -logp_of(case, logits), labels=case.labels.masked_fill(~case.mask, NEVER_SAMPLED))
        return gradient(loss / count, logits)

    return peer


def trainer(**changed: Any):
    """What _compute_loss_and_metrics reads of itself, at the defaults but for what is named."""
    own = dict(
        loss_type="dapo", beta=0.0, kl_in_reward=False, importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.28,
        compute_entropy=False, overlong_filter=False, rollout_importance_sampling_mode=None, rollout_importance_sampling_threshold=2.0,
        log_rollout_offpolicy_metrics=False, disable_rollout_importance_sampling=False, off_policy_sequence_mask_delta=None,
        _has_teacher=False, sdar_loss_coef=0, chord_sft_iterator=None, max_completion_length=S, model_accepts_loss_kwargs=False,
        compute_loss_func=None, current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather_for_metrics=lambda x: x), _metrics=defaultdict(lambda: defaultdict(list)),
        _compute_rollout_offpolicy_metrics=lambda *_: {}, _compute_is_correction_metrics=lambda *_: {},
    )  # fmt: skip
    self = swift.trainer()
    self.args = SimpleNamespace(delta=changed.pop("delta", None), log_entropy=False, top_entropy_quantile=1.0,
                                gradient_accumulation_steps=1, **changed.pop("chord_args", {}))  # fmt: skip
    vars(self).update(own | changed)
    return self


def policy_loss(case: Case, logits: Tensor, **options: Any) -> Tensor:
    count = options.pop("count", case.mask.sum())
    self = trainer(**options)
    self._get_per_token_logps_and_entropies = lambda *_, **__: (logp_of(case, logits), None)
    batch = SimpleNamespace(
        completion_mask=case.mask, truncated_mask=torch.zeros(len(case.mask), dtype=torch.bool), advantages=case.per_token(case.advantage),
        old_per_token_logps=case.old_logp, ref_per_token_logps=case.ref_logp, rollout_per_token_logps=case.rollout_logp,
        teacher_per_token_logps=None, num_items_in_batch=count,
    )  # fmt: skip
    return self._compute_loss_and_metrics(None, None, batch)[0]


def theirs(**options: Any):
    def peer(case: Case) -> Answer:
        logits = leaf(case)
        return gradient(policy_loss(case, logits, **options), logits)

    return peer


def theirs_in_two(loss_type: str):
    """Two micro-batches, each told the step's tokens and divided by 2 by transformers' Trainer."""

    def peer(case: Case) -> Answer:
        logits, count = leaf(case), case.mask.sum()
        self = {"loss_type": loss_type, "current_gradient_accumulation_steps": 2, "count": count}
        return gradient(sum(policy_loss(case.rows(part), logits[part], **self) for part in HALVES) / 2, logits)

    return peer


def chord(mu: float, phi: bool, parts: tuple[slice, ...] = (slice(None),)):
    """Answers and demonstrations of each micro-batch through _compute_loss_and_metrics, which hands its loss to compute_chord_loss."""

    def peer(case: Case) -> Answer:
        logits, total = leaf(case), 0.0
        for part in parts:
            rows, here = case.rows(part), logits[part]
            own, demos = rows.rows(~rows.expert), rows.rows(rows.expert)
            outputs, labels = unshifted(demos, here[rows.expert])
            args = dict(chord_mu_warmup_steps=0, chord_mu_decay_steps=0, chord_mu_peak=mu, chord_mu_valley=mu, chord_enable_phi_function=phi)
            self = {"loss_type": "bnpo", "chord_sft_iterator": iter([{"labels": labels}]), "state": SimpleNamespace(global_step=3),
                    "template": SimpleNamespace(data_collator=dict), "accelerator": SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
                    "chord": args, "forward": outputs}  # fmt: skip
            total = total + _mixed(own, here[~rows.expert], self) / len(parts)
        return gradient(total, logits)

    return peer


def _mixed(own: Case, logits: Tensor, options: dict[str, Any]) -> Tensor:
    args, outputs = options.pop("chord"), options.pop("forward")

    class Model:
        training = True

        def __call__(self, **inputs: Tensor) -> SimpleNamespace:
            assert not inputs, "labels were taken out before"
            return outputs

    return policy_loss(own, logits, model=Model(), chord_args=args, **options)


def advantages(rewards: Tensor, scale: str) -> Tensor:
    found, _ = swift.advantages(rewards.reshape(-1, 1), torch.ones(1, dtype=rewards.dtype), rewards.shape[1], scale_rewards=scale)
    return found.view_as(rewards)
