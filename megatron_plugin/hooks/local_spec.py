"""The layers of a GPT where Transformer Engine and apex are missing: megatron-core's local spec, with norms that know sequence parallelism.

megatron-core's own fallback refuses sequence parallelism ("sequence parallel not supported by torch LayerNorm", torch_norm.py).  What it
lacks is one tag: under sequence parallelism each TP rank sees its own part of the sequence, so the gradients of the norms' parameters are
partial, and finalize_model_grads sums over TP exactly the parameters marked `sequence_parallel`.  Our norms set that mark; they go in
through the spec, so no class of megatron-core is touched.  Attention is megatron-core's own DotProductAttention, and under context
parallelism, which that refuses, local_attention.py's subclass of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_plugin.hooks.accelerators import transformer_engine_usable
from megatron_plugin.hooks.local_attention import ContextParallelAttention

__all__ = ["LayerNorm", "RMSNorm", "block_spec", "local_block_spec"]


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor; its parameters carry `sequence_parallel`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _tag(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with megatron-core's constructor; its parameters carry `sequence_parallel`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _tag(self, config)


def _tag(norm: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel


def block_spec(config: TransformerConfig, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """What GPTModel takes as transformer_layer_spec: Transformer Engine's layers where they can run, otherwise `local_block_spec`."""
    if transformer_engine_usable():
        return get_gpt_decoder_block_spec(config=config, use_transformer_engine=True, vp_stage=vp_stage)
    return local_block_spec(config, vp_stage=vp_stage)


def local_block_spec(config: TransformerConfig, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (chunk `vp_stage` of it when interleaved) in plain torch, all norms ours, the final one included.

    ValueError for what the local layers cannot do."""
    for flag, usable in {"num_moe_experts": None, "multi_latent_attention": False, "layernorm_zero_centered_gamma": False}.items():
        if (got := getattr(config, flag)) != usable:
            raise ValueError(f"got {flag}={got}, expected {usable} without Transformer Engine; install it, or change the model's {flag}")
    if config.context_parallel_size > 1 and config.window_size is not None:  # megatron-core would count the window in the slice's places
        raise ValueError(f"got window_size={config.window_size} with context parallelism, expected None without Transformer Engine's attention")
    norms = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
    if config.normalization not in norms:
        raise ValueError(f"got normalization='{config.normalization}', expected one of {', '.join(norms)}")
    norm = norms[config.normalization]
    # A block spec rather than a layer spec: GPTModel would choose the final norm of a bare layer spec itself, and that one knows no SP.
    block = get_gpt_decoder_block_spec(config=config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage)
    return replace(block, layer_specs=[_with_ours(layer, norm, config) for layer in block.layer_specs], layer_norm=norm)


def _with_ours(layer: ModuleSpec, norm: type, config: TransformerConfig) -> ModuleSpec:
    """A copy of the layer with our norm in every slot that holds one, and under context parallelism our attention (the spec's own
    submodules are shared between layers)."""
    attention = layer.submodules.self_attention
    ours = {"q_layernorm": norm, "k_layernorm": norm} if config.qk_layernorm else {}
    if config.context_parallel_size > 1:
        ours["core_attention"] = ContextParallelAttention
    attention = replace(attention, submodules=replace(attention.submodules, **ours))
    submodules = replace(layer.submodules, input_layernorm=norm, pre_mlp_layernorm=norm, self_attention=attention)
    return replace(layer, submodules=submodules)
