"""The model, its optimizer and its learning rate, built from the configuration with megatron-core's own parts."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig

from megatron_plugin.config import Config
from megatron_plugin.hooks.local_spec import block_spec, local_block_spec
from megatron_plugin.hooks.mcore import adam, data_parallel, device, gpt_chunks, make_config

__all__ = ["build_model", "build_optimizer", "padded_vocab_size", "transformer_config"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def padded_vocab_size(config: Config, vocab_size: int) -> int:
    """Columns of the embedding: the true vocabulary up to a multiple that every tensor-parallel size divides."""
    multiple = math.lcm(config.gpt.make_vocab_size_divisible_by, config.parallel.tensor)
    return -(-vocab_size // multiple) * multiple


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's configuration: the fields of `model`, and those that follow from the other sections."""
    dtype, parallel, fields = DTYPES[config.train.dtype], config.parallel, dict(config.transformer)
    if "activation_func" in fields:
        fields["activation_func"] = ACTIVATIONS[fields["activation_func"]]
    fields.setdefault("hidden_dropout", 0.0)  # fine-tuning, and what makes runs comparable
    fields.setdefault("attention_dropout", 0.0)
    if config.data.packing:
        fields["masked_softmax_fusion"] = False  # the fused causal kernel ignores the mask that keeps packed samples apart
    return make_config(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=config.deterministic,
        **fields,
    )


def build_model(config: Config, transformer: TransformerConfig, vocab_size: int) -> list[DistributedDataParallel]:
    """This rank's model chunks (one, or `parallel.virtual` of them), each wrapped in megatron-core's DDP."""
    # Packed rows need a block-diagonal mask, which Transformer Engine's causal attention ignores: ours takes any mask
    spec, gpt = local_block_spec if config.data.packing else block_spec, asdict(config.gpt)
    del gpt["make_vocab_size_divisible_by"]  # the one that is not GPTModel's
    chunks = gpt_chunks(
        transformer, spec, vocab_size=padded_vocab_size(config, vocab_size), max_sequence_length=config.data.seq_length, **gpt
    )
    chunks = [chunk.to(device=device(), dtype=transformer.params_dtype) for chunk in chunks]
    return data_parallel(
        transformer, chunks, distributed_optimizer=config.parallel.distributed_optimizer, grad_reduce_in_fp32=True
    )


def build_optimizer(config: Config, transformer: TransformerConfig, chunks: list[DistributedDataParallel]):
    """(optimizer, scheduler): megatron-core's Adam with its tensor- and pipeline-parallel gradient clipping, warm-up and decay."""
    train = config.train
    # The scheduler's first value is that of step 0, which would be 0 and a wasted step: count from 1 while warming up
    return adam(
        transformer, chunks, lr=train.lr, init_lr=train.lr / (train.warmup_steps + 1), min_lr=train.min_lr, steps=train.steps,
        warmup_steps=train.warmup_steps, lr_decay=train.lr_decay, weight_decay=train.weight_decay, adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2, adam_eps=train.adam_eps, clip_grad=train.clip_grad,
    )  # fmt: skip
