"""What on-policy training must know of a loss beside its formula: one row a loss, instead of its name in the trainer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LOSS_ROLES", "LossRole", "role_of"]


@dataclass(frozen=True, kw_only=True)
class LossRole:
    """How expert samples and rollouts enter a step of on-policy training."""

    mixes: bool = False
    """Has a term for expert tokens and one for rollout tokens, so it cannot do without a section rollout."""
    mu: bool = False
    """The terms are weighted mu and 1 - mu, by the section mu or the preset's schedule; else each with 1."""
    demonstrations: bool = False
    """The experts of a step are the demonstrations of its prompts, which are judged, too, and join their groups."""


LOSS_ROLES: dict[str, LossRole] = {
    "chord": LossRole(mixes=True, mu=True),
    "srft": LossRole(mixes=True, demonstrations=True),
}
"""Losses with a role of their own; all others train on rollouts alone, or on experts alone where there are none."""


def role_of(loss_name: str, *, expert_samples: int, has_mu: bool) -> LossRole:
    """Of a loss by its name.  A function of the user's mixes where expert samples are asked for, by mu where there is such a section."""
    if "." in loss_name:
        return LossRole(mixes=expert_samples > 0, mu=has_mu)
    return LOSS_ROLES.get(loss_name, LossRole())
