"""Trinity-RFT's policy losses, advantages and KL, cut out of the files that hold them: its package does not import without Ray and vLLM.

Nothing of the arithmetic is replaced.  What is not there: the registry that finds the classes by name, and the store that experiences come
from (`Experience` below has the three fields that an advantage is made of).
"""

from __future__ import annotations

import copy
import inspect
import sys
from abc import ABC, ABCMeta, abstractmethod
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.parity.case import Case
from tests.parity.ours import Answer, gradient, leaf
from tests.parity.source import functions


def _root() -> Path:
    return next(Path(place) / "trinity/algorithm" for place in sys.path if (Path(place) / "trinity/algorithm").is_dir())


def _load() -> SimpleNamespace:
    root = _root()
    losses = root / "policy_loss_fn"
    utils = functions(root / "utils.py", "aggregate_loss", "masked_sum", "masked_mean")
    aggregation = {"aggregate_loss": utils.aggregate_loss, "masked_mean": utils.masked_mean}
    mappers = functions(root / "key_mapper.py", "KeyMapper", "ALL_MAPPERS")
    base = functions(losses / "policy_loss_fn.py", "PolicyLossFnMeta", "PolicyLossFn", inspect=inspect, ABC=ABC, ABCMeta=ABCMeta,
                     abstractmethod=abstractmethod, ALL_MAPPERS=mappers.ALL_MAPPERS).PolicyLossFn  # fmt: skip
    known = {"PolicyLossFn": base, **aggregation}
    found = {}
    for file, names in (("sft_loss", ["SFTLossFn"]), ("ppo_policy_loss", ["PPOPolicyLossFn"]), ("gspo_policy_loss", ["GSPOLossFn"]),
                        ("cispo_policy_loss", ["CISPOPolicyLossFn"]), ("mix_policy_loss", ["MIXPolicyLossFn"]),
                        ("chord_policy_loss", ["mu_schedule_function", "SFTISLossFn", "phi_function", "SFTPhiLossFn", "MIXCHORDPolicyLossFn"])):  # fmt: skip
        module = functions(losses / f"{file}.py", *names, **known, **found)
        found |= {name: getattr(module, name) for name in names}
    kl_names = ("KLFn", "K1Fn", "K2Fn", "K3Fn", "LowVarKLFn")
    kl = functions(root / "kl_fn/kl_fn.py", *kl_names, ABC=ABC, abstractmethod=abstractmethod, **aggregation)
    entropy = functions(root / "entropy_loss_fn/entropy_loss_fn.py", "EntropyLossFn", "DefaultEntropyLossFn", "MixEntropyLossFn", ABC=ABC,
                        abstractmethod=abstractmethod, **aggregation)  # fmt: skip
    group = functions(root / "advantage_fn/grpo_advantage.py", "GRPOGroupedAdvantage", GroupAdvantage=object, copy=copy,
                      group_by=_group_by, aggregate_metrics=lambda metrics, prefix: {})  # fmt: skip
    found |= {name: getattr(kl, name) for name in kl_names} | {"MixEntropyLossFn": entropy.MixEntropyLossFn}
    return SimpleNamespace(**found, DefaultEntropyLossFn=entropy.DefaultEntropyLossFn, GRPOGroupedAdvantage=group.GRPOGroupedAdvantage)


def _group_by(experiences: list, id_type: str) -> dict:
    found = defaultdict(list)
    for experience in experiences:
        found[experience.task].append(experience)
    return found


trinity = _load()


def logp_of(case: Case, logits: Tensor) -> Tensor:
    return (logits / case.temperature).log_softmax(-1).gather(-1, case.labels[..., None])[..., 0]


def policy(name: str, **options):
    """One of its losses on the whole batch, its options beside clips of 0.2 and 0.28."""
    made = getattr(trinity, name)(**options)

    def peer(case: Case) -> Answer:
        logits = leaf(case)
        return gradient(call(made, case, logits), logits)

    return peer


def call(made, case: Case, logits: Tensor) -> Tensor:
    loss, _ = made(logp_of(case, logits), old_logprob=case.old_logp, action_mask=case.mask, advantages=case.per_token(case.advantage))
    return loss


def mixed(parts: tuple[slice, ...], mu: float, name: str = "MIXCHORDPolicyLossFn", **options):
    """MIXCHORDPolicyLossFn (or MIXPolicyLossFn) over micro-batches, told the sizes of the step; gradients add up after / micro-batches."""

    def peer(case: Case) -> Answer:
        logits, experts = leaf(case), int(case.expert.sum())
        size = len(case.labels)
        weights = {"mu": mu} if name == "MIXPolicyLossFn" else {"mu_peak": mu, "mu_valley": mu}
        made = getattr(trinity, name)(
            clip_range_low=0.2, clip_range_high=0.28, ppo_mini_batch_size=size, ppo_micro_batch_size_per_gpu=size // len(parts),
            train_batch_size_usual=size - experts, train_batch_size_expert=experts, **weights, **options,
        )  # fmt: skip
        total = 0.0
        for part in parts:
            rows = case.rows(part)
            steps = {} if name == "MIXPolicyLossFn" else {"step": torch.full((len(rows.labels),), 5)}
            loss, _ = made(logp_of(rows, logits[part]), old_logprob=rows.old_logp, action_mask=rows.mask,
                           advantages=rows.per_token(rows.advantage), expert_mask=rows.expert, **steps)  # fmt: skip
            total = total + loss / len(parts)
        return gradient(total, logits)

    return peer


def kl(name: str):
    def peer(case: Case) -> Answer:
        logits = leaf(case)
        loss, _ = getattr(trinity, name)(kl_coef=0.5).calculate_kl_loss(logp_of(case, logits), case.ref_logp, case.mask, "token-mean")
        return gradient(loss, logits)

    return peer


def entropy(mixed: bool):
    def peer(case: Case) -> Answer:
        logits = leaf(case)
        logp = (logits / case.temperature).log_softmax(-1)
        made = (trinity.MixEntropyLossFn if mixed else trinity.DefaultEntropyLossFn)(0.1)
        loss, _ = made(-(logp.exp() * logp).sum(-1), case.mask, **({"expert_mask": case.expert} if mixed else {}))
        return gradient(-loss, logits)

    return peer


def advantages(rewards: Tensor, scale: str) -> Tensor:
    made = trinity.GRPOGroupedAdvantage(std_cal_level=scale)
    exps = [SimpleNamespace(task=task, reward=float(r), action_mask=torch.ones(1)) for task, row in enumerate(rewards) for r in row]
    made.process(exps)
    return torch.stack([e.advantages for e in exps]).view(rewards.shape)
