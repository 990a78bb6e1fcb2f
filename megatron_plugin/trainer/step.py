"""One pass of a step's rows through the pipeline, with or without gradients.

b rows of a micro-batch, s tokens per row, V/tp columns of the vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_plugin.config import Config
from megatron_plugin.data import PackedRows, attention_mask, shard
from megatron_plugin.hooks.forward_step import token_means
from megatron_plugin.trainer.model import device

__all__ = ["run_rows"]


def run_rows(
    config: Config, chunks: list, loss_func: Callable, data: PackedRows, rows: Sequence[int], names: Sequence[str], *, train: bool
) -> dict[str, float]:
    """Run `rows` (of all data-parallel ranks) through the model; with train=True the gradients are accumulated and finalised.

    Returns the token means of `names` and num_tokens, the same on every rank.
    """
    mine = shard(
        list(rows),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        micro_batch=config.train.micro_batch,
    )
    with torch.set_grad_enabled(train):
        reports = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, config, data, loss_func),
            data_iterator=[iter(mine) for _ in chunks],
            model=chunks,
            num_microbatches=len(mine),
            seq_length=config.data.seq_length,
            micro_batch_size=config.train.micro_batch,
            forward_only=not train,
        )
    return _on_every_rank(token_means(reports, group=parallel_state.get_data_parallel_group(with_context_parallel=True)), names)


def _forward_step(config: Config, data: PackedRows, loss_func: Callable, rows_of_micro_batches, model):
    """megatron-core's forward_step_func: the model's output and the loss_func that waits for it on the last stage."""
    batch = data.batch(next(rows_of_micro_batches)).map(lambda x: x.to(device(), non_blocking=True))
    mask = attention_mask(batch.segment_ids) if config.data.packing else None  # without packing, causal alone: padding comes last
    logits = model(batch.tokens, batch.position_ids, mask)
    return logits, partial(loss_func, labels=batch.labels, loss_mask=batch.loss_weight)


def _on_every_rank(means: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """The last pipeline stage has the means; the other stages are told."""
    keys = [*names, "num_tokens"]
    values = torch.tensor([means.get(key, 0.0) for key in keys], dtype=torch.float64, device=device())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(values, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return dict(zip(keys, values.tolist(), strict=True))
