"""Megatron's names for our keys, taken at the top level of a file and as overrides: tensor_model_parallel_size=2, --tensor-model-parallel-size 2.

Beside the table every field of TransformerConfig is an alias of model.<field>: num_layers=4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from megatron_plugin.config.errors import ConfigError

__all__ = ["ALIASES", "COMMAND_LINE", "HINTS", "Alias", "Layer", "check_spellings", "flag_takes_value", "translated"]

COMMAND_LINE = "command line"
"""Name of the layers that overrides make."""


@dataclass(frozen=True)
class Layer:
    """One source of values: the file, or one override."""

    values: dict[str, Any]
    name: str
    lines: dict[str, int]
    spelled: dict[str, str] = field(default_factory=dict)
    """{our key: the alias it was written as}."""

    def where(self, key: str) -> str:
        place = f"{self.name}:{self.lines[key]}" if key in self.lines else self.name
        return f"{place} (alias {self.spelled[key]})" if key in self.spelled else place


class Alias(NamedTuple):
    """Where a value of Megatron's goes."""

    key: str
    """Ours."""
    home: str
    """A dataclass of megatron-core that has a field of this name, or "argument": of Megatron-LM's command line."""
    convert: Callable[[Any], Any] | None = None
    """Its value -> ours; ValueError, saying what was expected, for one that there is not.  None: the same."""


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _no(value: Any) -> bool:
    return not _switch(value)


def _dtype(value: Any) -> str:
    return "bf16" if _switch(value) else "fp32"


def _one_if_none(value: Any) -> Any:
    return 1 if value is None else value


def _seconds(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a number of minutes")
    return round(60 * value)


ALIASES: dict[str, Alias] = {
    "tensor_model_parallel_size": Alias("parallel.tensor", "ModelParallelConfig"),
    "pipeline_model_parallel_size": Alias("parallel.pipeline", "ModelParallelConfig"),
    "virtual_pipeline_model_parallel_size": Alias("parallel.virtual", "ModelParallelConfig", _one_if_none),
    "num_virtual_stages_per_pipeline_rank": Alias("parallel.virtual", "argument", _one_if_none),
    "context_parallel_size": Alias("parallel.context", "ModelParallelConfig"),
    "sequence_parallel": Alias("parallel.sequence", "ModelParallelConfig"),
    "use_distributed_optimizer": Alias("parallel.distributed_optimizer", "OptimizerConfig"),
    "deterministic_mode": Alias("deterministic", "ModelParallelConfig"),
    "bf16": Alias("train.dtype", "ModelParallelConfig", _dtype),
    "micro_batch_size": Alias("train.micro_batch", "argument"),
    "global_batch_size": Alias("train.global_batch", "argument"),
    "train_iters": Alias("train.steps", "argument"),
    "lr": Alias("train.lr", "OptimizerConfig"),
    "min_lr": Alias("train.min_lr", "OptimizerConfig"),
    "lr_warmup_iters": Alias("train.warmup_steps", "argument"),
    "lr_decay_style": Alias("train.lr_decay", "argument"),
    "weight_decay": Alias("train.weight_decay", "OptimizerConfig"),
    "adam_beta1": Alias("train.adam_beta1", "OptimizerConfig"),
    "adam_beta2": Alias("train.adam_beta2", "OptimizerConfig"),
    "adam_eps": Alias("train.adam_eps", "OptimizerConfig"),
    "clip_grad": Alias("train.clip_grad", "OptimizerConfig"),
    "log_interval": Alias("train.log_interval", "argument"),
    "eval_interval": Alias("train.eval_interval", "argument"),
    "distributed_timeout_minutes": Alias("train.timeout_s", "argument", _seconds),
    "seq_length": Alias("data.seq_length", "argument"),
    "tokenizer_model": Alias("data.tokenizer", "argument"),
    "save": Alias("run_dir", "argument"),
    "save_interval": Alias("checkpoint.interval", "argument"),
    "async_save": Alias("checkpoint.asynchronous", "argument"),
    "norm_epsilon": Alias("model.layernorm_epsilon", "argument"),
    "num_experts": Alias("model.num_moe_experts", "argument"),
    "disable_bias_linear": Alias("model.add_bias_linear", "argument", _no),
    "untie_embeddings_and_output_weights": Alias("model.share_embeddings_and_output_weights", "argument", _no),
    "position_embedding_type": Alias("model.position_embedding_type", "argument"),
    "rotary_base": Alias("model.rotary_base", "argument"),
    "rotary_percent": Alias("model.rotary_percent", "argument"),
    "use_rope_scaling": Alias("model.rope_scaling", "argument"),
    "rope_scaling_factor": Alias("model.rope_scaling_factor", "argument"),
    "rotary_seq_len_interpolation_factor": Alias("model.seq_len_interpolation_factor", "argument"),
    "make_vocab_size_divisible_by": Alias("model.make_vocab_size_divisible_by", "argument"),
}
"""Megatron's name -> ours, where a value means the same."""

HINTS = {
    "params_dtype": "train.dtype", "pipeline_dtype": "train.dtype", "fp16": "train.dtype", "autocast_dtype": "train.dtype",
    "enable_autocast": "train.dtype", "max_sequence_length": "data.seq_length", "max_position_embeddings": "data.seq_length",
    "vocab_size": "data.tokenizer", "padded_vocab_size": "data.tokenizer", "load": "checkpoint.init", "data_path": "data.train",
    "swiglu": "model.gated_linear_unit", "num_layers_per_virtual_pipeline_stage": "parallel.virtual", "finetune": "checkpoint.init",
}  # fmt: skip
"""Megatron's name -> the key that is likely to be meant, where values mean something else: refused, with this as the remedy."""
SWITCHES = ("sequence_parallel", "use_distributed_optimizer", "deterministic_mode", "bf16", "async_save", "disable_bias_linear",
            "untie_embeddings_and_output_weights", "use_rope_scaling")  # fmt: skip


def flag_takes_value(name: str) -> bool:
    """Whether Megatron-LM's --name is followed by a value: not where it is a switch, or a field that is true or false and nothing else."""
    from megatron_plugin.config.megatron_fields import accepts, model_fields

    field = None if name in ALIASES else model_fields().get(name)
    return name not in SWITCHES and (field is None or not accepts(field, True) or accepts(field, 1) or accepts(field, ""))


def alias_of(name: str, known: Sequence[str]) -> Alias | None:
    """What a name at the top level stands for; None for one of our own (`known`) and for what is no alias."""
    if name in known or name in HINTS:
        return None
    if name in ALIASES:
        return ALIASES[name]
    from megatron_plugin.config.megatron_fields import RESERVED, model_fields  # 0.1 s of parsing: for a name that is not ours alone

    return Alias(f"model.{name}", "TransformerConfig") if name not in RESERVED and name in model_fields() else None


def translated(layer: Layer, known: Sequence[str]) -> tuple[Layer, list[ConfigError]]:
    """The layer with aliases written as our keys, and what is wrong with them: a value that ours does not have, or two spellings that differ."""
    spelled, lines, wrong = {}, dict(layer.lines), []
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in layer.values.items()}
    for name in list(values):
        alias = alias_of(name, known) if isinstance(name, str) else None
        if alias is None:
            continue
        value, where = values.pop(name), layer.where(name)
        try:
            value = alias.convert(value) if alias.convert else value
        except ValueError as error:
            wrong.append(ConfigError(f"got {value!r}, expected {error}: it is an alias of {alias.key}", name, where))
            continue
        own = _put(values, alias.key, value)
        if own is not _ABSENT:
            wrong += [_two(name, value, spelled.get(alias.key, alias.key), own, where)] if own != value else []
            continue
        spelled[alias.key] = name
        if name in lines:
            lines[alias.key] = lines.pop(name)
    return replace(layer, values=values, lines=lines, spelled=spelled), wrong


_ABSENT = object()


def _put(values: dict[str, Any], key: str, value: Any) -> Any:
    """Sets a dotted key; what stands there already, which is left, else _ABSENT."""
    section, dot, inner = key.partition(".")
    if not dot:
        there = values.get(section, _ABSENT)
        values.setdefault(section, value)
        return there
    if values.get(section) is None:
        values[section] = {}
    if not isinstance(values[section], dict):  # told as a section without keys
        return value
    if inner in values[section]:
        return values[section][inner]
    values[section][inner] = value
    return _ABSENT


def _two(name: str, value: Any, other: str, own: Any, where: str) -> ConfigError:
    return ConfigError(f"got {value!r} beside {other}={own!r}, expected one of the two, for both set the same key", name, where)


def check_spellings(layers: Sequence[Layer]) -> list[ConfigError]:
    """Errors for keys that the overrides of one command line set twice, under different names and to different values.

    (One name twice: the later one wins.)"""
    seen: dict[str, tuple[str, Any]] = {}
    wrong = []
    for layer in layers:
        for section, value in layer.values.items():
            for key, inner in ((f"{section}.{k}", v) for k, v in value.items()) if isinstance(value, dict) else [(section, value)]:
                name = layer.spelled.get(key, key)
                other, before = seen.get(key, (name, inner))
                if other != name and before != inner:
                    wrong.append(_two(name, inner, other, before, layer.name))
                seen[key] = (name, inner)
    return wrong
