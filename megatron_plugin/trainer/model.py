"""The model, its optimizer and its learning rate, built from the configuration with megatron-core's own parts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from megatron_plugin.config import Config
from megatron_plugin.hooks.local_spec import block_spec, local_block_spec

__all__ = ["build_model", "build_optimizer", "device", "padded_vocab_size", "transformer_config"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


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
    if not torch.cuda.is_available():  # the fusions are CUDA kernels; batched P2P synchronises a CUDA stream
        fields |= dict(use_cpu_initialization=True, batch_p2p_sync=False, masked_softmax_fusion=False, bias_dropout_fusion=False,
                       bias_activation_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False)
    return TransformerConfig(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # the one division per step that the loss_func counts on
        deterministic_mode=config.deterministic,
        **fields,
    )


def build_model(config: Config, transformer: TransformerConfig, vocab_size: int) -> list[DistributedDataParallel]:
    """This rank's model chunks (one, or `parallel.virtual` of them), each wrapped in megatron-core's DDP."""
    virtual = config.parallel.virtual
    chunks = [_chunk(config, transformer, vocab_size, stage if virtual > 1 else None) for stage in range(virtual)]
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [
        DistributedDataParallel(config=transformer, ddp_config=ddp, module=chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    transformer.finalize_model_grads_func = finalize_model_grads
    return wrapped


def _chunk(config: Config, transformer: TransformerConfig, vocab_size: int, vp_stage: int | None) -> GPTModel:
    # Packed rows need a block-diagonal mask, which Transformer Engine's causal attention ignores: ours takes any mask
    spec = (local_block_spec if config.data.packing else block_spec)(transformer, vp_stage=vp_stage)
    stage = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
    gpt = config.gpt
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(config, vocab_size),
        max_sequence_length=config.data.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        parallel_output=True,
        share_embeddings_and_output_weights=gpt.share_embeddings_and_output_weights,
        position_embedding_type=gpt.position_embedding_type,
        rotary_base=gpt.rotary_base,
        rotary_percent=gpt.rotary_percent,
        rope_scaling=gpt.rope_scaling,
        rope_scaling_factor=gpt.rope_scaling_factor,
        seq_len_interpolation_factor=gpt.seq_len_interpolation_factor,
        **({} if vp_stage is None else {"vp_stage": vp_stage}),
    )
    return model.to(device=device(), dtype=transformer.params_dtype)


def build_optimizer(config: Config, transformer: TransformerConfig, chunks: list[DistributedDataParallel]):
    """(optimizer, scheduler): megatron-core's Adam with its tensor- and pipeline-parallel gradient clipping, warm-up and decay."""
    train = config.train
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=train.lr, min_lr=train.min_lr, weight_decay=train.weight_decay, adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2, adam_eps=train.adam_eps, clip_grad=train.clip_grad, bf16=transformer.bf16,
            params_dtype=transformer.params_dtype,
        ),
        chunks,
    )
    transformer.grad_scale_func = optimizer.scale_loss
    # The scheduler's first value is that of step 0, which would be 0 and a wasted step: count from 1 while warming up
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=train.lr / (train.warmup_steps + 1), max_lr=train.lr, min_lr=train.min_lr, lr_warmup_steps=train.warmup_steps,
        lr_decay_steps=max(train.steps, train.warmup_steps + 1), lr_decay_style=train.lr_decay, start_wd=train.weight_decay,
        end_wd=train.weight_decay, wd_incr_steps=train.steps, wd_incr_style="constant",
    )
    return optimizer, scheduler
