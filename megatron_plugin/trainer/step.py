"""One pass of a step's micro-batches through the pipeline, with or without gradients: what every kind of training shares.

    mean of the step = sum over tokens of coefficient x weight x loss / N       coefficient = share x N / Z of the token's source

The coefficients are made from host masks of the whole step before the first forward (parallel/normaliser.py); the data weight of a token
multiplies as loss_mask.  b rows of a micro-batch, s tokens of a row, C context-parallel ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_plugin.config import Config
from megatron_plugin.data import PackedBatch, PackedRows, attention_mask, shard
from megatron_plugin.hooks.attach import Handle
from megatron_plugin.hooks.mcore import broadcast_from_last_stage, device, forward_backward, groups
from megatron_plugin.hooks.report import token_means
from megatron_plugin.losses.reduction import LossOutput
from megatron_plugin.parallel.context import context_slice
from megatron_plugin.parallel.normaliser import Source, StepCounts, coefficients, count_step, divisor, tokens_to_divide_by
from megatron_plugin.trainer.sources import step_mask, token_inputs
from megatron_plugin.trainer.stopwatch import timed

__all__ = ["Measure", "MicroBatch", "Step", "on_every_rank", "prepare_step", "run_rows", "run_step"]


Measure = Callable[[LossOutput, PackedBatch, Tensor], dict[str, Tensor]]


class MicroBatch(NamedTuple):
    """One micro-batch, on the host."""

    batch: PackedBatch
    """Whole rows, [b, s]."""
    coefficient: Tensor
    """[b, s/C] fp32, of this rank's slice: share x N / Z (/ tokens of the sequence), without the data weight."""
    divide_by: Tensor | None
    """0-d int32, this micro-batch's part of N where N is not the number of loss tokens."""


@dataclass(frozen=True)
class Step:
    """The micro-batches of this rank and what they are of the whole step."""

    micro_batches: list[MicroBatch]
    counts: StepCounts
    loss_tokens: int
    """Of the sources that have a share."""
    divided_by: int
    """N: what megatron-core divides the summed gradient by."""


def run_rows(
    config: Config, chunks: list, handle: Handle, data: PackedRows, rows: Sequence[int], names: Sequence[str], *, train: bool, watch: Measure | None = None
) -> dict[str, float]:
    """Run `rows` (of all data-parallel ranks) through the model; with train=True the gradients are accumulated and finalised.

    Returns the token means of `names` and num_tokens, the same on every rank.  Without `train` the loss is plain cross-entropy at temperature 1,
    whatever is attached: held-out data have a log-probability, but no advantage, old policy or reference; other names are 0 then.
    `watch`: run_step's `measure`; `names` may have what it adds."""
    ours = groups()
    mine = shard(list(rows), dp_rank=ours.dp.rank(), dp_size=ours.dp.size(), micro_batch=config.train.micro_batch)
    with timed("data"):
        batches = [data.batch(micro_batch) for micro_batch in mine]
    step = prepare_step(chunks, batches)
    with contextlib.nullcontext() if train else handle.plain(temperature=1.0):
        reports = run_step(config, chunks, handle, step, train=train, measure=watch)
    return on_every_rank(token_means(reports, group=ours.dp_cp), [*names, "num_tokens"])


def prepare_step(chunks: list, batches: Sequence[PackedBatch], *, expert: Source | None = None, rollout: Source | None = None) -> Step:
    """Count the step and form the coefficients of this rank's micro-batches: one all-reduce of eight numbers, on every rank.

    Without a column `expert` all tokens count as rollouts; a Source left out is the mean over its tokens with share 1."""
    ours, expert, rollout = groups(), expert or Source(), rollout or Source()
    masks = [step_mask(batch, ours.cp) for batch in batches]
    counts = count_step(masks, ours.dp_cp)
    loss_tokens, model = divisor(counts, expert=expert, rollout=rollout), chunks[0].config
    divided_by = tokens_to_divide_by(model, loss_tokens=loss_tokens, real_tokens=counts.real_tokens)
    made = []
    for batch, mask in zip(batches, masks, strict=True):
        coefficient = coefficients(mask, counts, expert=expert, rollout=rollout, divided_by=divided_by)
        part = tokens_to_divide_by(model, loss_tokens=None, real_tokens=mask.real.sum(dtype=torch.int32))
        made.append(MicroBatch(batch, coefficient, part))
    return Step(made, counts, loss_tokens, divided_by)


def run_step(
    config: Config,
    chunks: list,
    handle: Handle,
    step: Step,
    *,
    train: bool,
    measure: Measure | None = None,
    collect: Callable[[LossOutput], Tensor] | None = None,
) -> list:
    """The step's micro-batches through megatron-core's schedule: one report each on the last pipeline stage, [] on the others.

    A report is {name: [sum, tokens]}, `measure(output, this rank's slice of the batch, which tokens were trained)` added to it; or, with
    `collect` and without `train`, whatever that makes of the output."""
    forward_step = partial(_forward_step, config, handle, step, measure, collect)
    shape = (config.train.micro_batch, config.data.seq_length)
    return forward_backward(forward_step, step.micro_batches, chunks, shape=shape, train=train, collect=collect is not None)


def _forward_step(config: Config, handle: Handle, step: Step, measure, collect, micro_batches: Iterator[MicroBatch], model):
    """megatron-core's forward_step_func: the model's output and the loss_func that waits for it on the last stage.

    Under context parallelism every rank makes the whole rows and keeps its slice of them; of the mask, that of the queries."""
    part, context = next(micro_batches), groups().cp
    mask = attention_mask(part.batch.segment_ids) if config.data.packing else None  # without packing, causal alone: padding comes last
    mask = None if mask is None else context_slice(mask, 2, context).to(device(), non_blocking=True)
    batch = part.batch.map(lambda x: context_slice(x, 1, context))
    loss_mask = torch.where(part.coefficient != 0, batch.loss_weight, 0.0)
    on_host = loss_mask  # prompts, padding and sources without a share enter no GEMM of the head
    batch = batch.map(lambda x: x.to(device(), non_blocking=True))
    loss_mask, coefficient = (x.to(device(), non_blocking=True) for x in (loss_mask, part.coefficient))
    with handle.inputs(token_inputs(batch, coefficient), on_host=on_host):
        output = model(batch.tokens, batch.position_ids, mask, labels=batch.labels, loss_mask=loss_mask)
    if collect is not None:
        return output, lambda output, **_: collect(handle.output)
    return output, partial(_loss_func, handle, step, part.divide_by, measure and partial(measure, batch=batch, live=loss_mask != 0))


def _loss_func(handle: Handle, step: Step, divide_by: Tensor | None, measure, output: Tensor):
    """The attached loss's three-tuple with what `measure` adds; "lm loss" is the step's objective whatever N is."""
    num_tokens = None if divide_by is None else divide_by.to(output.device, non_blocking=True)
    total, count, pairs = handle.loss_func(output, num_tokens=num_tokens)
    if step.divided_by != step.loss_tokens:
        loss_sum, tokens = pairs["lm loss"]
        pairs = pairs | {"lm loss": torch.stack([loss_sum * (step.loss_tokens / step.divided_by), tokens])}
    return total, count, pairs if measure is None else pairs | measure(handle.output)


def on_every_rank(means: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """`names` of what the last pipeline stage has, told to the other stages; 0 where it has none."""
    values = torch.tensor([means.get(name, 0.0) for name in names], dtype=torch.float64, device=device())
    return dict(zip(names, broadcast_from_last_stage(values).tolist(), strict=True))
