"""Recipes name parameters that exist and values that are taken."""

import math
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from megatron_plugin.config.rollout import RolloutConfig
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.kl import LOG_RATIO_MAX
from megatron_plugin.losses.recipes import NO_DUAL_CLIP, RECIPES
from megatron_plugin.parallel.normaliser import DENOMINATORS

TYPES = get_type_hints(RolloutConfig)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_can_be_run(recipe):
    keys = RECIPES[recipe]
    loss = {key.removeprefix("loss."): value for key, value in keys.items() if key.startswith("loss.")}
    bind(loss.pop("name"), **loss)
    rollout = {key.removeprefix("rollout."): value for key, value in keys.items() if not key.startswith("loss.")}
    assert set(rollout) <= {f.name for f in fields(RolloutConfig)}
    for name, value in rollout.items():
        assert value in (get_args(TYPES[name]) or (value,)), f"rollout.{name}={value}"
    assert keys["rollout.aggregation"] in DENOMINATORS


def test_no_dual_clip_is_out_of_reach():
    assert NO_DUAL_CLIP > math.exp(LOG_RATIO_MAX) and math.isfinite(NO_DUAL_CLIP)


def test_what_tells_the_recipes_apart():
    """The differences that the papers are about."""
    assert RECIPES["dr_grpo"]["rollout.advantage_scale"] == "none" and RECIPES["dr_grpo"]["rollout.aggregation"] == "constant"
    assert RECIPES["dapo"]["loss.clip_high"] == 0.28 and RECIPES["dapo"]["loss.clip_low"] == 0.2 and RECIPES["dapo"]["rollout.aggregation"] == "token"
    assert RECIPES["grpo"]["rollout.aggregation"] == RECIPES["gspo"]["rollout.aggregation"] == "sequence"
    assert RECIPES["gspo"]["loss.clip_high"] < 1e-3 and "loss.kl" not in RECIPES["dapo"]
