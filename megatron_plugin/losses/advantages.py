"""Rewards to advantages, and what a whole answer counts for: on the host, once per rollout batch.  P prompts, n answers of a prompt, T tokens.

A step on several data-parallel ranks gives each rank whole groups; only the batch's standard deviation needs the others (`reward_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_plugin.losses.kl import LOG_RATIO_MAX

__all__ = ["SEQUENCE_CORRECTIONS", "augmented_advantages", "group_advantages", "informative", "overlong_penalty", "reward_sums", "sequence_weight"]

Groups = Tensor | Sequence[Sequence[float] | Tensor]
"""Rewards by prompt: a tensor [P, n], or P sequences of any length."""
SCALES = ("group", "batch", "none")
SEQUENCE_CORRECTIONS = ("sequence_tis", "sequence_mask", "opsm")


def group_advantages(rewards: Groups, *, scale: str = "group", eps: float = 1e-6, sums: Tensor | None = None) -> Tensor | list[Tensor]:
    """(R - mean of the group) / (std + eps), fp64; a tensor [P, n] for one, else a list of [n_p].

    scale: "group", the group's standard deviation (GRPO, arXiv 2402.03300, 4.1.2); "batch", that of all rewards of the step (TRL's
    scale_rewards="batch"); "none", 1 (Dr. GRPO, arXiv 2503.20783).  Deviations have n - 1 in the denominator, as in Trinity, verl and TRL.
    eps: 1e-6 as in Trinity and verl; TRL has 1e-4.
    sums: for "batch" on several ranks, `reward_sums` of each added up; by default of these rewards alone.
    A group of equal rewards is exactly 0.  A group of one has no mean to compare with: its mean is taken as 0 and its deviation as 1, as in
    Trinity and verl, so it keeps its R.
    ValueError for rewards that are not finite numbers, an empty group, or an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"group_advantages: got scale={scale!r}, expected one of {', '.join(SCALES)}")
    groups = _groups(rewards, "group_advantages")
    batch_std = _std_of_sums(reward_sums(rewards) if sums is None else sums) if scale == "batch" else 1.0
    advantages = [_advantages(group, scale, eps, batch_std) for group in groups]
    return torch.stack(advantages) if isinstance(rewards, Tensor) and advantages else advantages


def augmented_advantages(rewards: Groups, demos: Groups, *, over_answers: bool = False, eps: float = 1e-6) -> tuple[list[Tensor], list[Tensor]]:
    """SRFT: advantages of answers and of demonstrations, both by the mean and deviation of their union (arXiv 2506.19767, eq. 6 and 7).

    rewards, demos: the same P prompts; a prompt without demonstration has an empty one.  fp64, lists of [n_p] and [d_p].
    Demonstrations usually have reward 1 and raise the mean.  over_answers: mean and deviation of the answers alone, as in the released code,
    where a deviation of 0 counts as 1.  ValueError as in `group_advantages`, and for another number of prompts.
    """
    groups = _groups(rewards, "augmented_advantages")
    shown = _groups(demos, "augmented_advantages", empty=True)
    if len(groups) != len(shown):
        raise ValueError(f"augmented_advantages: got demonstrations of {len(shown)} prompts, expected those of the same {len(groups)}")
    if over_answers:
        made = [(_advantages(group, "group", eps, 1.0), _against(group, demo, eps)) for group, demo in zip(groups, shown, strict=True)]
        return [own for own, _ in made], [of_demo for _, of_demo in made]
    joined = [_advantages(torch.cat(pair), "group", eps, 1.0) for pair in zip(groups, shown, strict=True)]
    return [a[: len(g)] for a, g in zip(joined, groups, strict=True)], [a[len(g) :] for a, g in zip(joined, groups, strict=True)]


def reward_sums(rewards: Groups) -> Tensor:
    """Number of rewards, their sum, and the sum of their squares: fp64 [3], to be added over data-parallel ranks for scale="batch"."""
    every = torch.cat([*_groups(rewards, "reward_sums", empty=True), torch.zeros(0, dtype=torch.float64)])
    return torch.stack([torch.tensor(float(len(every)), dtype=torch.float64), every.sum(), every.square().sum()])


def informative(rewards: Groups) -> Tensor:
    """bool [P]: groups that teach something, those with unequal rewards (DAPO's dynamic sampling, arXiv 2503.14476, eq. 11).

    A group of one counts, as in verl: nothing is known of it.
    """
    return torch.tensor([len(group) == 1 or bool((group != group[0]).any()) for group in _groups(rewards, "informative")], dtype=torch.bool)


def overlong_penalty(lengths: Tensor | Sequence[int], *, max_tokens: int, buffer: int, factor: float = 1.0) -> Tensor:
    """What is added to the reward of an answer of this many tokens, fp64 in [-factor, 0] (DAPO, arXiv 2503.14476, eq. 13).

    0 up to max_tokens - buffer, from there linearly down to -factor at max_tokens and beyond.  buffer = 0: no penalty.
    ValueError unless 0 <= buffer <= max_tokens and factor >= 0.
    """
    if not 0 <= buffer <= max_tokens or factor < 0:
        raise ValueError(
            f"overlong_penalty: got buffer={buffer}, max_tokens={max_tokens}, factor={factor}, expected 0 <= buffer <= max_tokens and factor >= 0"
        )
    over = torch.as_tensor(lengths, dtype=torch.float64) - (max_tokens - buffer)
    if buffer == 0:
        return torch.zeros_like(over)
    return -factor * (over / buffer).clamp(0, 1) + 0.0  # -0.0 + 0.0 = 0.0


def sequence_weight(old_logp_T: Tensor, rollout_logp_T: Tensor, *, mode: str, bound: float, advantage: float = 0.0) -> float:
    """What one answer counts for, given that the rollout engine and not the trainer's policy drew it: a factor on each of its tokens.

    old_logp_T, rollout_logp_T: nats of its sampled tokens, by the trainer before the first update and by the engine.  r is the answer's
    ratio, the product of p_old / p_rollout.
        sequence_tis    min(r, bound)                  truncated importance sampling
        sequence_mask   r where r <= bound, else 0     masked importance sampling; TRL's default, with bound = 3
        opsm            0 where advantage < 0 and mean(log p_rollout - log p_old) > bound (nats), else 1: off-policy sequence masking.  slime
                        (1e-4) and Trinity (0.1) have p_old and p in the place of p_rollout and p_old
    A product over a long answer is far from 1 even where every token is close: 0.1% each way are a factor of 2.7 after 1000 tokens.  The
    log-ratio is held to +-20 nats.  A 0 belongs in the mask before `count_step`: a coefficient of 0 leaves num_tokens and the normaliser's
    count apart.  ValueError for an unknown mode, a bound that does not fit, or log-probabilities that are not numbers of one shape [T].
    """
    _check_sequence(old_logp_T, rollout_logp_T, mode, bound)
    log_ratio_T = old_logp_T.double() - rollout_logp_T.double()
    if mode == "opsm":
        return 0.0 if advantage < 0 and float(-log_ratio_T.mean()) > bound else 1.0
    ratio = float(log_ratio_T.sum().clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp())
    if ratio <= bound:
        return ratio
    return bound if mode == "sequence_tis" else 0.0


def _check_sequence(old_logp_T: Tensor, rollout_logp_T: Tensor, mode: str, bound: float) -> None:
    if mode not in SEQUENCE_CORRECTIONS:
        raise ValueError(f"sequence_weight: got mode={mode!r}, expected one of {', '.join(SEQUENCE_CORRECTIONS)}")
    if not bound >= 0 or (bound == 0 and mode != "opsm"):
        raise ValueError(f"sequence_weight: got bound={bound}, expected {'nats >= 0' if mode == 'opsm' else 'a ratio > 0'}")
    if old_logp_T.shape != rollout_logp_T.shape or old_logp_T.dim() != 1 or not len(old_logp_T):
        raise ValueError(
            f"sequence_weight: got old_logp {list(old_logp_T.shape)} and rollout_logp {list(rollout_logp_T.shape)}, expected one number for each "
            "sampled token in both, and at least one token"
        )
    for name, logp_T in (("old_logp", old_logp_T), ("rollout_logp", rollout_logp_T)):
        if not logp_T.isfinite().all():
            place = int((~logp_T.isfinite()).nonzero()[0])
            raise ValueError(f"sequence_weight: {name} of token {place} is {float(logp_T[place])}, expected a finite log-probability")


def _groups(rewards: Groups, caller: str, *, empty: bool = False) -> list[Tensor]:
    groups = [torch.as_tensor(group, dtype=torch.float64).detach() for group in rewards]
    for number, group in enumerate(groups):
        if group.dim() != 1 or (len(group) == 0 and not empty):
            raise ValueError(f"{caller}: group {number} has shape {list(group.shape)}, expected the rewards of one prompt's answers, at least one")
        if not group.isfinite().all():
            raise ValueError(f"{caller}: group {number} holds {group.tolist()}, expected finite rewards: which reward function gave them?")
    return groups


def _advantages(group: Tensor, scale: str, eps: float, batch_std: float | Tensor) -> Tensor:
    alone = len(group) == 1
    if not alone and (group == group[0]).all():
        return torch.zeros_like(group)  # the mean of equal numbers may be one rounding off, and (0.1 - mean) / eps is then not 0
    centred = group if alone else group - group.mean()
    if scale == "none":
        return centred
    std = batch_std if scale == "batch" else 1.0 if alone else group.std()  # torch's std has n - 1
    return centred / (std + eps)


def _against(group: Tensor, demo: Tensor, eps: float) -> Tensor:
    """Advantages of `demo` by the mean and deviation of `group`."""
    std = group.std() if len(group) > 1 and (group != group[0]).any() else torch.ones((), dtype=torch.float64)
    return (demo - group.mean()) / (std + eps)


def _std_of_sums(sums: Tensor) -> Tensor:
    count, total, squares = sums.double()
    if count < 2:
        return torch.ones((), dtype=torch.float64)
    return ((squares - total * total / count) / (count - 1)).clamp(min=0).sqrt()
