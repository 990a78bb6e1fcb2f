"""A GPTModel seen from outside: its chunks without wrappers, its parameters under names of the whole model, and whether it is the model
that a config.json describes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_plugin.hooks.weights.errors import WeightsError
from megatron_plugin.hooks.weights.hf_config import LLAMA3, ModelFields
from megatron_plugin.hooks.weights.names import Dims, Rule, rule_of
from megatron_plugin.hooks.weights.slices import shard_shape, shards_of

__all__ = ["Parameter", "bare_models", "check_model", "dims_of", "parameters", "whole_model_name"]

# Of TransformerConfig: what a Llama or Qwen does not have.  Not all of them are in every version of megatron-core
ABSENT = {"layernorm_zero_centered_gamma": False, "rotary_interleaved": False, "multi_latent_attention": False, "qk_l2_norm": False,
          "attention_output_gate": False, "apply_residual_connection_post_layernorm": False, "softmax_scale": None, "softmax_type": "vanilla",
          "window_size": None, "no_rope_freq": None, "glu_linear_offset": 0.0, "activation_func_clamp_value": None,
          "mtp_num_layers": None}  # fmt: skip
OF_TRAINING = ("hidden_dropout", "attention_dropout")
ROTARY = 1e-5  # relative, of a frequency: fp32 powers differ by 1e-7, a wrong base or scaling by far more


@dataclass(frozen=True)
class Parameter:
    """One parameter on this rank."""

    name: str
    """Layer and expert counted over the whole model: the same on every rank that has a shard of it."""
    tensor: Tensor
    rule: Rule
    shard: int
    shards: int
    is_first_replica: bool
    """This rank speaks for the data- and context-parallel ranks that hold the same shard."""


def bare_models(chunks: torch.nn.Module | Sequence[torch.nn.Module]) -> list[GPTModel]:
    """The GPTModels in what a trainer holds: one, or a list of virtual stages, bare or in DDP, Float16Module and the like."""
    found = []
    chunk: Any
    for chunk in chunks if isinstance(chunks, Sequence) else [chunks]:
        while not isinstance(chunk, GPTModel) and hasattr(chunk, "module"):
            chunk = chunk.module
        if not isinstance(chunk, GPTModel):
            raise WeightsError(f"got a model of {type(chunk).__name__}, expected megatron-core's GPTModel, bare or wrapped, or a list of chunks")
        found.append(chunk)
    return found


def dims_of(chunks: list[GPTModel], vocab_size: int) -> Dims:
    """Sizes of the built model, with Hugging Face's vocabulary."""
    return Dims.of(vars(chunks[0].config), tied=chunks[0].share_embeddings_and_output_weights, vocab=vocab_size)


def parameters(chunks: list[GPTModel], dims: Dims) -> Iterator[Parameter]:
    """Every parameter of this rank.  WeightsError for one without a rule, or of another shape than its rule says."""
    first_expert = parallel_state.get_expert_model_parallel_rank() * dims.experts // parallel_state.get_expert_model_parallel_world_size()
    for chunk in chunks:
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, tensor in chunk.named_parameters():
            yield _parameter(whole_model_name(name, layers, first_expert), tensor, dims, chunk.vocab_size)


def _parameter(name: str, tensor: Tensor, dims: Dims, padded_vocab: int) -> Parameter:
    rule, ps = rule_of(name, dims), parallel_state
    rank, size = (ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()) if rule.is_expert else (
        ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size())  # fmt: skip
    replica = ps.get_expert_data_parallel_rank() if rule.is_expert else ps.get_data_parallel_rank(with_context_parallel=True)
    shards = shards_of(rule, size)
    if tuple(tensor.shape) != (expected := shard_shape(rule, shards, padded_vocab)):
        raise WeightsError(f"{name}: got a shape of {tuple(tensor.shape)} on this rank, expected {expected}: shard {rank} of {shards} of "
                           f"{' and '.join(part.name for part in rule.parts)}")  # fmt: skip
    return Parameter(name, tensor, rule, rank if shards > 1 else 0, shards, replica == 0)


def whole_model_name(name: str, layers: Sequence[int], first_expert: int = 0) -> str:
    """A chunk's name of a parameter, with layer and expert counted over the whole model.

    `layers`: the chunk's layers, from 0; `first_expert`: of this expert-parallel rank."""
    words = name.split(".")
    if words[:2] == ["decoder", "layers"]:
        words[2] = str(layers[int(words[2])])
    if "local_experts" in words:  # SequentialMLP: a module per expert
        place = words.index("local_experts") + 1
        words[place] = str(first_expert + int(words[place]))
    elif "experts" in words and words[-1].removeprefix("weight").isdigit():  # TEGroupedMLP: a weight per expert
        words[-1] = f"weight{first_expert + int(words[-1].removeprefix('weight'))}"
    return ".".join(words)


def check_model(chunks: list[GPTModel], fields: ModelFields) -> None:
    """WeightsError naming every field in which the built model differs from config.json: field, got, expected."""
    wrong = []
    for chunk in chunks:
        expected = {k: v for k, v in fields.transformer_arguments().items() if k not in OF_TRAINING} | ABSENT
        got = {name: getattr(chunk.config, name, ABSENT.get(name)) for name in expected}
        expected |= {k: v for k, v in fields.gpt.items() if k in ("position_embedding_type", "share_embeddings_and_output_weights")}
        got |= {k: getattr(chunk, k) for k in ("position_embedding_type", "share_embeddings_and_output_weights")}
        wrong += [f"{name}: got {_shown(got[name])}, expected {_shown(value)}" for name, value in expected.items() if got[name] != value]
        if chunk.vocab_size < fields.vocab_size:
            wrong.append(f"vocab_size: got {chunk.vocab_size}, expected at least {fields.vocab_size}")
        wrong += _rotary_differences(chunk, fields)
    if wrong:
        raise WeightsError(f"the model is not the one of config.json: {'; '.join(dict.fromkeys(wrong))} (transformer_fields(config) has "
                           "the fields to build it with)")  # fmt: skip


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)


def _rotary_differences(chunk: GPTModel, fields: ModelFields) -> list[str]:
    """Compares the frequencies the model really rotates with, since GPTModel does not keep all it was told."""
    if chunk.position_embedding_type != "rope":
        return []  # said already
    got, expected = chunk.rotary_pos_emb.inv_freq.float().cpu(), rotary_frequencies(fields)
    if got.shape != expected.shape:
        return [f"rotary_percent: got {got.numel()} frequencies, expected {expected.numel()}"]
    if torch.allclose(got, expected, rtol=ROTARY, atol=0) and not chunk.rotary_pos_emb.seq_len_interpolation_factor:
        return []
    told = ", ".join(f"{name}={fields.gpt.get(name)}" for name in ("rotary_base", "rope_scaling", "rope_scaling_factor"))
    return [f"rotary_base or rope_scaling: got lowest frequencies {got[-2:].tolist()}, expected {expected[-2:].tolist()} ({told})"]


def rotary_frequencies(fields: ModelFields) -> Tensor:
    """[kv_channels / 2], radians per token, fp32: theta^(-2i/d), with Llama 3's scaling as in transformers' modeling_rope_utils.py."""
    d, gpt = fields.transformer["kv_channels"], fields.gpt
    frequencies = 1.0 / (gpt["rotary_base"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d))
    if not gpt["rope_scaling"]:
        return frequencies
    low, high, factor = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"], gpt["rope_scaling_factor"]
    turns = LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the context the model was first trained on
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies
