"""The losses as they are read from their source text are those that are imported."""

import inspect

import pytest

from megatron_plugin.config import ConfigError, load_config
from megatron_plugin.config.checks import evaluated
from megatron_plugin.config.loss_fields import _written, loss_fields, regularisers
from megatron_plugin.losses import LOSSES
from megatron_plugin.losses.regularisers import REGULARISERS
from tests.config.test_smoke import CONFIGS


def test_names_and_parameters_are_the_imported_ones():
    assert {name: set(takes) for name, takes in _written().items()} == {name: set(list(inspect.signature(loss.fn).parameters)[2:]) for name, loss in LOSSES.items()}
    assert regularisers() == tuple(REGULARISERS)


def test_a_loss_that_a_program_added_is_known(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", LOSSES["idft"])
    assert loss_fields()["mine"] == loss_fields()["idft"]
    assert load_config(CONFIGS / "sft.yaml", ["loss.name=mine", "loss.beta=2"]).loss_name == "mine"


@pytest.mark.parametrize("overrides, message", [
    (["loss.name=dtf"], "loss.name: got 'dtf' (did you mean 'dft'?), expected one of chord, "),
    (["loss.name=idft", "loss.gama_max=1"], "loss.gama_max: got a parameter that loss idft has not (did you mean 'gamma_max'?), expected one of beta, "),
    (["loss.clip_low=1"], "loss.clip_low: got a parameter that loss sft has not, expected one of entropy_bonus, z_loss"),
    (["ramp.warmup_ratio=0.1"], "ramp: got a schedule, expected none: loss sft has no parameter ramp"),
])  # fmt: skip
def test_what_bind_would_refuse_is_refused_with_the_configuration(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "sft.yaml", overrides)
    assert message in str(caught.value)


def test_a_function_of_the_users_is_not_looked_at():
    load_config(CONFIGS / "sft.yaml", ["loss.name=my_package.my_loss", "loss.anything=1", "ramp.warmup_ratio=0.1"])


def test_the_metrics_that_a_best_checkpoint_can_have():
    assert evaluated(load_config(CONFIGS / "sft.yaml")) == ["eval/heldout_nll", "eval/ood_nll"]
    assert evaluated(load_config(CONFIGS / "sft.yaml", ["data.train=a", "data.eval=b"])) == ["eval/heldout_nll"]
    assert evaluated(load_config(CONFIGS / "sft.yaml", ["data.eval=[x/b.jsonl,c.jsonl]"])) == ["eval/b_nll", "eval/c_nll"]
    assert evaluated(load_config(CONFIGS / "grpo.yaml", ["data.eval=x", "rollout.eval_n=0"])) == ["eval/heldout_nll", "eval/heldout_reward_greedy"]
    for override in ("checkpoint.best=eval/heldout_accuracy", "checkpoint.best=train/loss"):
        with pytest.raises(ConfigError, match="expected a metric of every evaluation"):
            load_config(CONFIGS / "sft.yaml", [override])
    with pytest.raises(ConfigError, match="none, for data.eval is empty"):
        load_config(CONFIGS / "sft.yaml", ["data.train=a", "checkpoint.best=eval/heldout"])
