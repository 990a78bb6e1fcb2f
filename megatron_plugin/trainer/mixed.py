"""Expert demonstrations and own rollouts in one optimizer step: packed into the same rows, scored, trained.

    mixed = mix(config, samples)                                     # of this data-parallel rank; experts have the column expert = 1
    old = score(config, chunks, handle, mixed)                       # when the rollouts are used for more than one update
    mixed = mixed.with_columns("old_logp", [x.logp_T for x in old])
    means = train_mixed(config, chunks, handle, mixed, expert=Source(share=mu), rollout=Source(share=1 - mu, denominator="sequence"), names=names)

All four are collective: every rank of the job calls them, also with no sample of its own, and every rank of one replica (tensor, pipeline and
context parallel) with the same samples.  T: tokens of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.config import Config
from megatron_plugin.data import BLANK_ROW, DataError, PackedBatch, PackedRows, PackingReport, Sample, pack_samples
from megatron_plugin.hooks.attach import Handle
from megatron_plugin.hooks.mcore import broadcast_from_last_stage, device, groups
from megatron_plugin.hooks.report import token_means
from megatron_plugin.losses.reduction import LossOutput
from megatron_plugin.parallel.context import context_gather
from megatron_plugin.parallel.normaliser import Source
from megatron_plugin.trainer.sources import is_expert, source_metrics, source_names
from megatron_plugin.trainer.step import Measure, on_every_rank, prepare_step, run_step
from megatron_plugin.trainer.stopwatch import timed

__all__ = ["MixedRows", "Scored", "mix", "score", "train_mixed"]

PAD_ID = 0  # any id: padding attends to padding only, and has no label


@dataclass(frozen=True)
class Scored:
    """One sample under the model as it is; fp32 [T] on the host, at the tokens' own places, 0 where untrained."""

    logp_T: Tensor
    """nats."""
    entropy_T: Tensor
    """nats."""


@dataclass(frozen=True)
class MixedRows:
    """The samples of one data-parallel rank as rows, and its micro-batches."""

    rows: PackedRows
    micro_batches: tuple[tuple[int, ...], ...]
    """Indices of rows, BLANK_ROW where there are none left: as many micro-batches on every rank, as many rows in each."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """As given to `mix`."""
        return self.rows.samples

    def batches(self) -> list[PackedBatch]:
        """Of each micro-batch, whole rows on the host."""
        return [self.rows.batch(rows) for rows in self.micro_batches]

    def with_columns(self, name: str, values: Sequence[Tensor]) -> MixedRows:
        """The same rows with the column `name`: one tensor [T] per sample, in the order of `samples`; on every rank, also one without samples.

        ValueError for another number of tensors, or one that is not one value per token."""
        if len(values) != len(self.samples):
            raise ValueError(f"column '{name}': got {len(values)} tensors, expected one for each of the {len(self.samples)} samples")
        samples = tuple(
            replace(sample, columns={**sample.columns, name: x.detach().float().cpu()}) for sample, x in zip(self.samples, values, strict=True)
        )
        columns = tuple(sorted({*self.rows.columns, name}))
        return replace(self, rows=replace(self.rows, samples=samples, columns=columns))


def mix(config: Config, samples: Sequence[Sample]) -> MixedRows:
    """Rows of data.seq_length from this data-parallel rank's samples, cut into the same number of micro-batches on every rank.

    With data.packing several samples share a row, experts and rollouts alike; without, each has its own.  What is missing to whole
    micro-batches, to those of the other ranks, and to what interleaved pipeline stages take at a time, is filled with blank rows.  Every
    batch has the columns of all ranks' samples, so that the loss is the same function everywhere.

    DataError, on every rank, for a sample of any rank that is longer than a row: rollouts are cut where they are drawn, not here."""
    size, parallel = config.train.micro_batch, config.parallel
    try:
        rows, problem = _pack(config, samples), None
    except DataError as error:
        rows, problem = _pack(config, []), str(error)
    needed, columns = _agreed(-(-len(rows) // size), rows.columns, problem, groups().dp)
    at_a_time = math.lcm(parallel.pipeline, config.transformer.get("microbatch_group_size_per_vp_stage") or 1) if parallel.virtual > 1 else 1
    needed = -(-max(needed, 1) // at_a_time) * at_a_time
    order = [*range(len(rows)), *[BLANK_ROW] * (needed * size - len(rows))]
    return MixedRows(replace(rows, columns=columns), tuple(tuple(order[i : i + size]) for i in range(0, len(order), size)))


def _pack(config: Config, samples: Sequence[Sample]) -> PackedRows:
    if samples:
        return pack_samples(samples, config.data.seq_length, pad_id=PAD_ID, packing=config.data.packing)
    nothing = PackingReport(samples=0, rows=0, tokens=0, loss_tokens=0, fill=0.0, truncated=(), dropped=())
    return PackedRows((), (), config.data.seq_length, PAD_ID, nothing)


def _agreed(needed: int, columns: tuple[str, ...], problem: str | None, group: dist.ProcessGroup) -> tuple[int, tuple[str, ...]]:
    """The largest number of micro-batches that any data-parallel rank needs, and the names of all ranks' columns; DataError for a problem of any."""
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, (needed, columns, problem), group=group)
    if problems := [text for *_, text in everyone if text]:  # where one rank alone stopped, the others would wait for it
        raise DataError("\n".join(problems))
    return max(n for n, *_ in everyone), tuple(sorted({name for _, names, _ in everyone for name in names}))


def train_mixed(
    config: Config, chunks: list, handle: Handle, mixed: MixedRows, *, expert: Source, rollout: Source, names: Sequence[str], watch: Measure | None = None
) -> dict[str, float]:
    """Accumulate and finalise the gradient of one step: each source by its own share and denominator over the whole step.

    A source of share 0 takes no part: its samples are taken out before anything is packed, so that the rollouts' gradient with mu = 0 is, bit
    for bit, the one without expert data.  Gradients are neither zeroed before nor applied after.

    Returns, the same on every rank, num_tokens, the token means of `names` (of metric_names; over all trained tokens, those called expert/...
    or rollout/... over the tokens of that source), and
      expert_nll, expert_entropy, expert_weight_mean, rollout_nll, rollout_entropy, rollout_weight_mean   token means of each source
      expert_tokens, rollout_tokens   trained tokens of each source in the step
      ratio_mean        mean of p / p_old over rollout tokens; 1 without the column old_logp
      clip_frac         share of rollout tokens that the loss clips; where `names` has it, or rollout/clip_frac
      k3                mean of r - 1 - log r over rollout tokens, r = p / p of the rollout engine: how far the two are apart (nats, >= 0)
      logp_diff_max     largest |log p - log p of the rollout engine| of a rollout token (nats); these two with the column rollout_logp
    and token means of what `watch` (run_step's `measure`) adds, where `names` has it.  A mean over no token is nan.  ValueError when neither source has a share."""
    if not (expert.share or rollout.share):
        raise ValueError("got share 0 for expert and rollout tokens, expected at least one of them above 0: the step would train nothing")
    with timed("data"):
        mixed = _of_sources(config, mixed, expert=expert, rollout=rollout)
        batches = mixed.batches()
    step = prepare_step(chunks, batches, expert=expert, rollout=rollout)
    peaks: list[Tensor] = []

    def measure(output: LossOutput, batch: PackedBatch, live: Tensor) -> dict[str, Tensor]:
        pairs, peak = source_metrics(output, batch.columns, live)
        peaks.extend([] if peak is None else [peak])
        return pairs | watch(output, batch, live) if watch else pairs

    reports = run_step(config, chunks, handle, step, train=True, measure=measure)
    means = token_means(reports, group=groups().dp_cp)
    wanted = list(dict.fromkeys([*names, "num_tokens", *source_names(mixed.rows.columns)]))
    if "rollout/clip_frac" in names:
        wanted.append("clip_frac")
    if "rollout_logp" in mixed.rows.columns:
        wanted.append("logp_diff_max")
        compared = step.counts.rollout.tokens > 0  # experts alone: 0 would look like agreement
        means |= {"logp_diff_max": _largest(peaks) if compared else math.nan} if reports else {}
    tokens = {"expert_tokens": step.counts.expert.tokens, "rollout_tokens": step.counts.rollout.tokens}
    return on_every_rank(means, wanted) | {name: float(count) for name, count in tokens.items()}


def _of_sources(config: Config, mixed: MixedRows, *, expert: Source, rollout: Source) -> MixedRows:
    """The samples whose source has a share, packed anew where that leaves some out; the columns stay."""
    if expert.share and rollout.share:
        return mixed
    kept = mix(config, [sample for sample in mixed.samples if is_expert(sample) == bool(expert.share)])
    return replace(kept, rows=replace(kept.rows, columns=mixed.rows.columns))


def _largest(peaks: Sequence[Tensor]) -> float:
    peak = torch.stack(list(peaks)).amax()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=groups().dp_cp)
    return float(peak)


@torch.no_grad()
def score(config: Config, chunks: list, handle: Handle, mixed: MixedRows) -> list[Scored]:
    """Log-probability and entropy of every trained token under the model as it is, in the rows that training will use; no gradient, no dropout.

    One Scored per sample of `mixed`, the same on every rank of the replica.  The attached loss is not asked: columns it needs may not exist yet."""
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        step = prepare_step(chunks, mixed.batches())
        with handle.plain():
            found = run_step(config, chunks, handle, step, train=False, collect=_logp_and_entropy)
    finally:
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)
    whole_M2bs = _whole(config, found, len(mixed.micro_batches))
    logp, entropy = {}, {}
    for rows, (logp_bs, entropy_bs) in zip(mixed.micro_batches, whole_M2bs, strict=True):
        logp |= mixed.rows.unpacked(rows, logp_bs)
        entropy |= mixed.rows.unpacked(rows, entropy_bs)
    return [Scored(logp[i], entropy[i]) for i in range(len(mixed.samples))]


def _logp_and_entropy(output: LossOutput) -> Tensor:
    """[2, b, s/C]"""
    return torch.stack([output.per_token.logp, output.per_token.entropy])


def _whole(config: Config, found: Sequence[Tensor], micro_batches: int) -> Tensor:
    """[M, 2, b, s] on the host of every rank of the replica, from the slices that the last pipeline stage has."""
    ours = groups()
    if found:
        values = context_gather(torch.stack(list(found)), 3, ours.cp)
    else:
        values = torch.empty((micro_batches, 2, config.train.micro_batch, config.data.seq_length), device=device())
    return broadcast_from_last_stage(values.contiguous()).cpu()
