"""The keys of a configuration: unknown ones are refused with the one that was meant, known ones are documented; without torch."""

import dataclasses
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_plugin.config import ConfigError, GPTArguments, load_config
from megatron_plugin.config.aliases import ALIASES, HINTS
from megatron_plugin.config.keys import key_types
from megatron_plugin.config.megatron_fields import OURS, RESERVED, model_fields

CONFIGS = Path(__file__).parent.parent / "configs"
DEBUG = CONFIGS / "debug_cpu.yaml"


def refused(override: str, path: Path = DEBUG) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override] if override else [])
    return caught.value


UNKNOWN = {
    "train.lrr=1": "train.lr", "dtype=bf16": "train.dtype", "train.Steps=1": "train.steps",
    "train.tensor=2": "parallel.tensor",
    "checkpoint.intervall=1": "checkpoint.interval", "mu.pek=1": "mu.peak", "seeed=1": "seed", "model.num_layer=3": "model.num_layers",
    "model.rotary_bas=1": "model.rotary_base", "num_layer=3": "model.num_layers", "model.hiden_size=3": "model.hidden_size",
    "model.lr=1": "train.lr", "name=dft": "loss.name",
}  # fmt: skip


@pytest.mark.parametrize("override, meant", UNKNOWN.items())
def test_unknown_key_is_refused_with_the_key_that_was_meant(override, meant):
    error = refused(override)
    assert (error.key, error.where) == (override.partition("=")[0], "command line")
    assert f"did you mean '{meant}'?" in str(error)


def test_unknown_key_of_a_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 1\ndata:\n  seq_lenght: 3\n")
    assert str(refused("", path)).startswith(f"{path}:3: data.seq_lenght: got an unknown key; did you mean 'data.seq_length'?")


def test_unknown_key_like_nothing_lists_what_there_is():
    assert "expected one of parallel.tensor, parallel.pipeline, " in str(refused("parallel.tp=2"))
    assert "expected one of run_dir, seed, " in str(refused("zzz.qqq=2"))
    assert "sources" not in str(refused("sources.a=2")).split("expected")[1]


@pytest.mark.parametrize("prefix", ["model.", "train."])
@pytest.mark.parametrize("name, ours", OURS.items())
def test_megatron_names_below_a_section_are_answered_with_ours(prefix, name, ours):
    """At the top level those that mean the same are taken: tests/config/test_aliases.py."""
    error = refused(f"{prefix}{name}=1")
    assert f"use '{ours}'" in str(error)
    assert ours in key_types() or ours.removeprefix("model.") in model_fields()


@pytest.mark.parametrize("name, ours", HINTS.items())
def test_megatron_names_that_mean_something_else_are_refused(name, ours):
    assert f"use '{ours}'" in str(refused(f"{name}=1"))


@pytest.mark.parametrize("name", RESERVED)
def test_fields_that_the_plugin_owns_are_refused(name):
    assert RESERVED[name] in str(refused(f"model.{name}=1"))


def test_fields_that_no_yaml_can_hold_are_refused():
    for name in ("init_method", "timers", "grad_scale_func", "attention_backend"):
        assert "Python object" in str(refused(f"model.{name}=1"))


def test_model_takes_exactly_what_megatron_core_takes():
    """The names read from the source text against the imported classes."""
    from megatron.core.transformer import TransformerConfig

    imported = {f.name for f in dataclasses.fields(TransformerConfig) if not f.name.startswith("_")}
    assert set(model_fields()) == imported | {f.name for f in dataclasses.fields(GPTArguments)}
    assert set(RESERVED) <= imported
    owned = {"tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "sequence_parallel",
    "bf16",
             "context_parallel_size", "calculate_per_token_loss", "params_dtype", "pipeline_dtype", "deterministic_mode"}  # fmt: skip
    assert owned <= imported & (set(ALIASES) | set(OURS) | set(RESERVED))


def test_gpt_arguments_are_those_of_gpt_model():
    import inspect

    from megatron.core.models.gpt import GPTModel

    parameters = inspect.signature(GPTModel).parameters
    for f in dataclasses.fields(GPTArguments):
        if f.name != "make_vocab_size_divisible_by":
            assert parameters[f.name].default == f.default


def test_readme_names_every_file_and_every_key():
    text = (CONFIGS / "README.md").read_text()
    for path in CONFIGS.glob("*.yaml"):
        assert f"`{path.name}`" in text
    tables = {row.split("|")[1].strip().strip("`"): row for row in text.splitlines() if row.startswith("|")}
    for key in key_types():
        section, _, leaf = key.rpartition(".")
        assert f"`{leaf}`" in (tables[section] if section else text), key
    for f in dataclasses.fields(GPTArguments):
        assert f"`{f.name}`" in tables["model"]


def test_every_field_of_the_schema_is_documented():
    """A text below each field, but for those whose name is Megatron's own (GPTArguments) or a beta or epsilon of Adam."""
    source = "".join((CONFIGS.parent / "megatron_plugin" / "config" / f"{name}.py").read_text() for name in ("schema", "rollout"))
    for key, kind in key_types().items():
        name = key.rpartition(".")[2]
        if not dataclasses.is_dataclass(kind) and not name.startswith("adam_"):
            assert re.search(rf'^    {name}: .*\n    """', source, re.M), key


def test_a_mistyped_key_costs_no_torch_and_no_two_seconds():
    probe = """
import json, sys
from megatron_plugin.config import ConfigError, load_config
try:
    load_config(sys.argv[1], ["model.num_layer=3"])
except ConfigError as error:
    print(json.dumps([str(error), [name for name in ("torch", "megatron.core", "transformers", "numpy") if name in sys.modules]]))
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # CPU time: the wall clock of a busy machine says little
    done = subprocess.run([sys.executable, "-c", probe, str(DEBUG)], capture_output=True, text=True, check=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    message, loaded = json.loads(done.stdout)
    assert "did you mean 'model.num_layers'?" in message
    assert loaded == []
    assert seconds < 2, seconds
