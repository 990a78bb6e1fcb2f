"""Megatron's names for our keys: each row against megatron-core's real fields and Megatron-LM's real arguments, and what is taken and refused."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from megatron_plugin.cli.arguments import UsageError, arranged
from megatron_plugin.cli.commands import parser
from megatron_plugin.config import ConfigError, load_config, to_yaml
from megatron_plugin.config.aliases import ALIASES, HINTS, SWITCHES
from megatron_plugin.config.keys import key_types
from megatron_plugin.config.megatron_fields import OURS, RESERVED, model_fields

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "configs/debug_cpu.yaml"
ARGUMENTS = json.loads((Path(__file__).parent / "option_names.json").read_text())["Megatron-LM"]
VALUES = {  # what is written, what our key then is
    "virtual_pipeline_model_parallel_size": ("null", 1), "num_virtual_stages_per_pipeline_rank": ("1", 1), "sequence_parallel": ("false", False),
    "use_distributed_optimizer": ("true", True), "deterministic_mode": ("true", True), "bf16": ("true", "bf16"), "train_iters": ("30", 30),
    "lr": ("3e-4", 3e-4), "min_lr": ("1e-5", 1e-5), "lr_warmup_iters": ("3", 3), "lr_decay_style": ("linear", "linear"), "weight_decay": ("0.2", 0.2),
    "adam_beta1": ("0.8", 0.8), "adam_beta2": ("0.9", 0.9), "adam_eps": ("1e-6", 1e-6), "clip_grad": ("2.0", 2.0), "distributed_timeout_minutes": ("2", 120),
    "tokenizer_model": ("a/b", "a/b"), "save": ("runs/x", "runs/x"), "async_save": ("true", True), "disable_bias_linear": ("true", False),
    "untie_embeddings_and_output_weights": ("true", False), "position_embedding_type": ("none", "none"), "use_rope_scaling": ("true", True),
    "rotary_percent": ("0.5", 0.5), "norm_epsilon": ("1e-6", 1e-6), "rope_scaling_factor": ("4.0", 4.0), "seq_length": ("32", 32), "micro_batch_size": ("4", 4),
    "global_batch_size": ("4", 4),
}  # fmt: skip


def value(config, key):
    section, _, inner = key.partition(".")
    part = getattr(config, section)
    return part if not inner else part[inner] if isinstance(part, dict) else getattr(part, inner)


def fields_of(name) -> set[str]:
    from megatron.core import ModelParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    home = {"ModelParallelConfig": ModelParallelConfig, "OptimizerConfig": OptimizerConfig, "TransformerConfig": TransformerConfig}[name]
    return {f.name for f in dataclasses.fields(home)}


@pytest.mark.parametrize("name", ALIASES)
def test_a_row_is_real_on_both_sides(name):
    alias = ALIASES[name]
    assert name in (ARGUMENTS["names"] if alias.home == "argument" else fields_of(alias.home)), f"no {name} in {alias.home}"
    assert alias.key in key_types() or alias.key.removeprefix("model.") in model_fields()


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_is_of_a_real_name(name):
    assert name in ARGUMENTS["names"] or name in fields_of("TransformerConfig") | {"max_sequence_length", "vocab_size"}  # these two: of GPTModel


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_sets_our_key(name):
    written, expected = VALUES.get(name, ("2", 2))
    config = load_config(DEBUG, [f"{name}={written}"])
    assert value(config, ALIASES[name].key) == expected
    assert config.sources[ALIASES[name].key] == f"command line (alias {name})"


def test_every_switch_is_one_of_megatrons():
    assert set(SWITCHES) <= set(ALIASES)
    for name in SWITCHES:
        assert VALUES[name][0] in ("true", "false") and name in ARGUMENTS["switches"] or ALIASES[name].home != "argument" or name in ARGUMENTS["switches"]


def test_every_field_of_transformer_config_is_an_alias_of_model():
    config = load_config(DEBUG, ["num_layers=6", "normalization=LayerNorm", "hidden_size=32"])
    assert (config.model["num_layers"], config.model["normalization"], config.model["hidden_size"]) == (6, "LayerNorm", 32)
    assert config.sources["model.num_layers"] == "command line (alias num_layers)"
    for name in RESERVED:
        with pytest.raises(ConfigError):
            load_config(DEBUG, [f"{name}=1"])


def test_aliases_of_a_file_have_its_lines_and_show_where_they_come_from(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("tensor_model_parallel_size: 2\ntrain_iters: 7\nnum_layers: 4\nmodel:\n  hidden_size: 64\n  num_attention_heads: 4\n")
    config = load_config(path, world_size=2)
    assert (config.parallel.tensor, config.train.steps, config.model["num_layers"]) == (2, 7, 4)
    shown = to_yaml(config)
    assert f"# {path}:1 (alias tensor_model_parallel_size)" in shown and f"# {path}:3 (alias num_layers)" in shown
    (tmp_path / "again.yaml").write_text(shown)
    assert load_config(tmp_path / "again.yaml") == config
    assert f"{path}:1 (alias tensor_model_parallel_size): world size: got 3 ranks" in str(refused(path, world_size=3))


def refused(path, *overrides, world_size=None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    assert caught.value.exit_code == 2
    return caught.value


def test_two_spellings_that_differ_are_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(DEBUG.read_text() + "parallel: {tensor: 1}\ntensor_model_parallel_size: 2\n")
    assert "tensor_model_parallel_size: got 2 beside parallel.tensor=1, expected one of the two" in str(refused(path))
    path.write_text(DEBUG.read_text() + "parallel: {tensor: 2}\ntensor_model_parallel_size: 2\n")
    assert load_config(path).parallel.tensor == 2
    assert load_config(path, ["tensor_model_parallel_size=4"]).parallel.tensor == 4, "the command line goes over the file, however it is spelled"
    for overrides in (["parallel.tensor=2", "tensor_model_parallel_size=4"], ["tensor_model_parallel_size=4", "parallel.tensor=2"]):
        assert "expected one of the two" in str(refused(path, *overrides))
    assert load_config(path, ["tensor_model_parallel_size=2", "tensor_model_parallel_size=4"]).parallel.tensor == 4, "one name twice: the later one"


@pytest.mark.parametrize("override, message", [
    ("bf16=maybe", "bf16: got 'maybe', expected true or false"), ("tensor_model_parallel_size=two", "parallel.tensor: got 'two', expected a whole number"),
    ("distributed_timeout_minutes=soon", "expected a number of minutes"), ("lr_decay_style=WSD", "got 'WSD', expected one of cosine, linear, constant"),
    ("tensor_model_parallel=2", "did you mean"),
])  # fmt: skip
def test_values_that_ours_does_not_have(override, message):
    assert message in str(refused(DEBUG, override))


@pytest.mark.parametrize("words, overrides", [
    (["--tensor-model-parallel-size", "2"], ["tensor_model_parallel_size=2"]), (["--lr=1e-5"], ["lr=1e-5"]), (["--sequence-parallel"], ["sequence_parallel=true"]),
    (["--bf16", "train.steps=3"], ["bf16=true", "train.steps=3"]), (["--num-layers", "4", "--disable-bias-linear"], ["num_layers=4", "disable_bias_linear=true"]),
    (["--smoke", "train.steps=3"], ["train.steps=3"]),
])  # fmt: skip
@pytest.mark.parametrize("command", [["train"], ["config", "show"]])
def test_flags_of_the_command_line(command, words, overrides):
    found = arranged([*command, "x.yaml", *words])
    assert [word for word in found if "=" in word] == overrides and found[: len(command) + 1] == [*command, "x.yaml"]
    assert ("--smoke" in found) == ("--smoke" in words)


@pytest.mark.parametrize("command", ["train", "config show"])
def test_every_order_is_understood(command):
    spelled = {"x.yaml": "", "train.steps=3": "train.steps=3", "--smoke": "", "--num-layers 4": "num_layers=4"}
    for words in itertools.permutations(spelled):
        arguments = parser().parse_args(arranged([*command.split(), *" ".join(words).split()]))
        assert (arguments.config, arguments.smoke) == ("x.yaml", True), words
        assert arguments.overrides == [spelled[word] for word in words if spelled[word]], words


@pytest.mark.parametrize("words, overrides", [
    ("--qk-layernorm train.steps=3", ["qk_layernorm=true", "train.steps=3"]), ("--add-qkv-bias --bf16", ["add_qkv_bias=true", "bf16=true"]),
    ("--qk-layernorm false --bf16 false", ["qk_layernorm=false", "bf16=false"]), ("--calculate-per-token-loss", ["calculate_per_token_loss=true"]),
    ("--ffn-hidden-size 96", ["ffn_hidden_size=96"]), ("--fp8 hybrid", ["fp8=hybrid"]), ("--layernorm-epsilon 1e-6", ["layernorm_epsilon=1e-6"]),
])  # fmt: skip
def test_a_switch_leaves_the_next_word(words, overrides):
    assert parser().parse_args(arranged(["train", "x.yaml", *words.split()])).overrides == overrides


@pytest.mark.parametrize("flag", [f"--{name.replace('_', '-')}" for name in HINTS])
def test_a_flag_that_means_something_else_names_ours(flag):
    with pytest.raises(UsageError, match=f"expected ours: use '{HINTS[flag[2:].replace('-', '_')]}'"):
        arranged(["train", flag, "x.yaml"])


def test_other_commands_and_other_flags_are_left_alone():
    assert arranged(["score", "x", "y", "--samples", "3", "parallel.tensor=2"]) == ["score", "x", "y", "--samples", "3", "parallel.tensor=2"]
    assert arranged(["train", "x.yaml", "--frobnicate", "3"]) == ["train", "x.yaml", "3", "--frobnicate"]
    with pytest.raises(UsageError, match="without a value"):
        arranged(["train", "x.yaml", "--train-iters"])
    with pytest.raises(UsageError, match="did you mean --global-batch-size"):
        arranged(["train", "x.yaml", "--global-batch-sizes", "3"])


@pytest.mark.parametrize("override, key, expected", [
    ("data.tokenizer=no", "data.tokenizer", "no"), ("tokenizer_model=1e5", "data.tokenizer", "1e5"), ("data.train=off", "data.train", ["off"]),
    ("log.wandb=007", "log.wandb", "007"), ("data.tokenizer=null", "data.tokenizer", ""), ("data.tokenizer=", "data.tokenizer", ""),
    ("data.train=[a,no]", "data.train", ["a", "False"]), ("deterministic=no", "deterministic", False),
])  # fmt: skip
def test_a_bare_word_stays_the_text_it_is(override, key, expected, monkeypatch):
    monkeypatch.setattr("megatron_plugin.config.log_checks._installed", lambda module: True)
    assert value(load_config(DEBUG, [override]), key) == expected


def test_names_below_a_section_are_not_aliases():
    assert not {name for name in OURS if name in model_fields() and ALIASES.get(name) and ALIASES[name].key == f"model.{name}"}
