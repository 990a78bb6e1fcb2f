"""Recipes name keys that exist and values that are taken, and say where in the order of precedence they stand."""

import math
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megatron_plugin.config import ConfigError, load_config
from megatron_plugin.config.recipes import NO_DUAL_CLIP, RECIPES
from megatron_plugin.config.rollout import RolloutConfig
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.kl import LOG_RATIO_MAX
from megatron_plugin.parallel.normaliser import DENOMINATORS

CONFIGS = Path(__file__).parent.parent / "configs"
TYPES = get_type_hints(RolloutConfig)
SUPERVISED = [name for name in RECIPES if name.startswith("idft")]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in SUPERVISED])
def test_a_recipe_of_on_policy_training_can_be_run(recipe):
    keys = RECIPES[recipe]
    loss = {key.removeprefix("loss."): value for key, value in keys.items() if key.startswith("loss.")}
    bind(loss.pop("name"), **loss)
    rollout = {key.removeprefix("rollout."): value for key, value in keys.items() if not key.startswith("loss.")}
    assert set(rollout) <= {f.name for f in fields(RolloutConfig)}
    for name, value in rollout.items():
        assert value in (get_args(TYPES[name]) or (value,)), f"rollout.{name}={value}"
    assert keys["rollout.aggregation"] in DENOMINATORS


@pytest.mark.parametrize("recipe", SUPERVISED)
def test_a_recipe_of_idft_can_be_run(recipe):
    config = load_config(CONFIGS / "idft.yaml", [f"recipe={recipe}"], world_size=4)
    bind(config.loss_name, **config.loss_params)
    assert config.ramp is not None and config.rollout is None
    for key, value in RECIPES[recipe].items():
        section, _, name = key.partition(".")
        got = getattr(config, section)
        assert (got[name] if section == "loss" else getattr(got, name)) == value, key


def test_no_dual_clip_is_out_of_reach():
    assert NO_DUAL_CLIP > math.exp(LOG_RATIO_MAX) and math.isfinite(NO_DUAL_CLIP)


def test_what_tells_the_recipes_apart():
    """The differences that the papers are about."""
    assert RECIPES["dr_grpo"]["rollout.advantage_scale"] == "none" and RECIPES["dr_grpo"]["rollout.aggregation"] == "constant"
    assert RECIPES["dapo"]["loss.clip_high"] == 0.28 and RECIPES["dapo"]["loss.clip_low"] == 0.2 and RECIPES["dapo"]["rollout.aggregation"] == "token"
    assert RECIPES["grpo"]["rollout.aggregation"] == RECIPES["gspo"]["rollout.aggregation"] == "sequence"
    assert RECIPES["gspo"]["loss.clip_high"] < 1e-3 and "loss.kl" not in RECIPES["dapo"]
    assert [name for name in SUPERVISED if RECIPES[name]["loss.gamma_max"] == 1.0] == ["idft_1.5b"]
    assert [name for name in SUPERVISED if RECIPES[name]["ramp.warmup_ratio"]] == ["idft", "idft_7b"]


def test_later_overrides_and_the_same_file_go_over_a_recipe(tmp_path):
    config = load_config(CONFIGS / "idft.yaml", ["loss.beta=3", "recipe=idft_7b", "train.lr=1e-5"])
    assert config.loss["beta"] == 1.0 and config.train.lr == 1e-5 and config.ramp.warmup_ratio == 0.2
    assert config.sources["loss.beta"] == "recipe idft_7b (command line)" and config.sources["train.lr"] == "command line"
    mine = tmp_path / "mine.yaml"
    mine.write_text("ramp: {warmup_ratio: 0.5}\nrecipe: idft\nmodel: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}\n")
    config = load_config(mine)
    assert (config.ramp.warmup_ratio, config.ramp.transition_ratio, config.loss_name) == (0.5, 0.1, "idft")
    assert config.sources["ramp.transition_ratio"] == f"recipe idft ({mine}:2)"


def test_a_recipe_that_does_not_exist_is_refused_with_the_one_that_was_meant():
    for recipe, hint in (("idtf", "did you mean 'idft'?"), ("zzz", "expected one of grpo, dr_grpo"), ("[1]", "expected one of")):
        with pytest.raises(ConfigError, match=hint.replace("?", r"\?")) as raised:
            load_config(CONFIGS / "idft.yaml", [f"recipe={recipe}"])
        assert raised.value.key == "recipe" and raised.value.where == "command line"
