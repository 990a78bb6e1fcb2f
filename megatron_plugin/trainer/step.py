"""One pass of a step's rows through the pipeline, with or without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from megatron_plugin.config import Config
from megatron_plugin.data import PackedRows, attention_mask, shard
from megatron_plugin.hooks.attach import Handle
from megatron_plugin.hooks.mcore import Groups, broadcast_from_last_stage, device, forward_backward, groups
from megatron_plugin.hooks.report import token_means
from megatron_plugin.losses.contract import TokenInputs
from megatron_plugin.parallel.context import context_slice

__all__ = ["run_rows"]


def run_rows(
    config: Config, chunks: list, handle: Handle, data: PackedRows, rows: Sequence[int], names: Sequence[str], *, train: bool
) -> dict[str, float]:
    """Run `rows` (of all data-parallel ranks) through the model; with train=True the gradients are accumulated and finalised.

    Returns the token means of `names` and num_tokens, the same on every rank.
    """
    ours = groups()
    mine = shard(list(rows), dp_rank=ours.dp.rank(), dp_size=ours.dp.size(), micro_batch=config.train.micro_batch)
    forward_step = partial(_forward_step, config, data, handle, ours)
    reports = forward_backward(forward_step, mine, chunks, shape=(config.train.micro_batch, config.data.seq_length), train=train)
    return _on_every_rank(token_means(reports, group=ours.dp_cp), names)


def _forward_step(config: Config, data: PackedRows, handle: Handle, ours: Groups, rows_of_micro_batches, model):
    """megatron-core's forward_step_func: the model's output and the loss_func that waits for it on the last stage.

    Under context parallelism every rank makes the whole rows and keeps its slice of them; of the mask, that of the queries."""
    batch = data.batch(next(rows_of_micro_batches))
    mask = attention_mask(batch.segment_ids) if config.data.packing else None  # without packing, causal alone: padding comes last
    mask = None if mask is None else context_slice(mask, 2, ours.cp).to(device(), non_blocking=True)
    batch = batch.map(lambda x: context_slice(x, 1, ours.cp))
    on_host = batch.loss_weight  # prompts and padding enter no GEMM of the head
    batch = batch.map(lambda x: x.to(device(), non_blocking=True))
    with handle.inputs(TokenInputs(), on_host=on_host):
        output = model(batch.tokens, batch.position_ids, mask, labels=batch.labels, loss_mask=batch.loss_weight)
    return output, handle.loss_func


def _on_every_rank(means: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """The last pipeline stage has the means; the other stages are told."""
    keys = [*names, "num_tokens"]
    values = torch.tensor([means.get(key, 0.0) for key in keys], dtype=torch.float64, device=device())
    return dict(zip(keys, broadcast_from_last_stage(values).tolist(), strict=True))
