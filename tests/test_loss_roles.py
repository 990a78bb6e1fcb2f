"""What on-policy training knows of losses beside their formulas."""

import ast
from pathlib import Path

import pytest

from megatron_plugin import LOSSES
from megatron_plugin.config.loss_roles import LOSS_ROLES, LossRole, role_of

TRAINER = Path(__file__).parent.parent / "megatron_plugin" / "trainer"


def test_roles_are_of_losses_that_there_are():
    assert set(LOSS_ROLES) <= set(LOSSES) and all(role.mixes for role in LOSS_ROLES.values())


@pytest.mark.parametrize("name, expert_samples, has_mu, role", [
    ("chord", 4, False, LossRole(mixes=True, mu=True)), ("srft", 0, False, LossRole(mixes=True, demonstrations=True)), ("grpo", 4, False, LossRole()),
    ("my.loss", 4, False, LossRole(mixes=True)), ("my.loss", 4, True, LossRole(mixes=True, mu=True)), ("my.loss", 0, False, LossRole()),
])  # fmt: skip
def test_the_role_of_a_loss(name, expert_samples, has_mu, role):
    assert role_of(name, expert_samples=expert_samples, has_mu=has_mu) == role


def test_no_loss_is_known_to_the_trainer_by_its_name():
    """Names are compared in config/ alone; a new loss needs a row there, not an `if` here."""
    named = [
        f"{path.name}:{node.lineno}"
        for path in TRAINER.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare) and any(isinstance(part, ast.Constant) and part.value in LOSSES for part in (node.left, *node.comparators))
    ]  # fmt: skip
    assert not named, named
