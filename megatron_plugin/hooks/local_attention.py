"""Attention under context parallelism without Transformer Engine: megatron-core's own DotProductAttention on gathered keys and values.

For a CPU and for tests: every rank holds the keys and values of the whole sequence (Transformer Engine passes them around a ring instead)
and the scores of its own queries with all of them.  What is new here is the gather and the mask; scaling, query groups, softmax, dropout and
checkpoint keys are megatron-core's, which refuses context parallelism with a bare assert.

b sequences, s tokens of a sequence over all C ranks, n heads and g query groups of this rank, d channels of a head.
"""

from __future__ import annotations

from copy import copy

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_plugin.hooks.mcore import context_group_of
from megatron_plugin.parallel.context import context_gather, context_slice

__all__ = ["ContextParallelAttention"]


class ContextParallelAttention(DotProductAttention):
    """A core_attention for layer specs; queries, keys and values are this rank's zig-zag slices (parallel/context.py)."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        alone = copy(config)
        alone.context_parallel_size = 1  # what the constructor asserts
        alone.masked_softmax_fusion = False  # the fused causal kernel takes no mask, and ours is not the triangle
        super().__init__(alone, *args, **kwargs)
        self.config = config
        self.cp_group = context_group_of(kwargs)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: object, packed_seq_params=None, **kwargs: object
    ) -> Tensor:
        """query [s/C, b, n, d], key and value [s/C, b, g, d] -> [s/C, b, n * d].

        attention_mask: None for plain causal attention, or bool [b or 1, 1, s/C, s], True = masked out: this rank's queries, all keys in
        their true order: `context_slice(attention_mask(segment_ids), 2, cp_group)`, the slice that megatron-core takes of it.
        ValueError for a mask of another shape, and for packed_seq_params."""
        if packed_seq_params is not None:
            raise ValueError("got packed_seq_params, expected None without Transformer Engine: pass the block-diagonal attention_mask instead")
        length = query.shape[0]
        key, value = context_gather(key, 0, self.cp_group), context_gather(value, 0, self.cp_group)
        wanted = (length, key.shape[0])
        if attention_mask is None:
            causal_ss = torch.ones(key.shape[0], key.shape[0], dtype=torch.bool, device=query.device).triu(1)
            attention_mask = context_slice(causal_ss, 0, self.cp_group)[None, None]
        elif tuple(attention_mask.shape[-2:]) != wanted:
            raise ValueError(
                f"got an attention_mask of {list(attention_mask.shape)}, expected [b, 1, {wanted[0]}, {wanted[1]}]: the queries of this "
                "context-parallel rank and all keys; cut it with context_slice(mask, 2, cp_group)"
            )
        return super().forward(query, key, value, attention_mask, *args, **kwargs)
