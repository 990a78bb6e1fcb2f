"""Expert demonstrations and own rollouts as the loss sees them: per-token inputs from columns, masks for the normaliser, metrics of each source.

b rows of a micro-batch, s tokens of a row (this rank's slice of it under context parallelism).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_plugin.data import IGNORE_INDEX, PackedBatch, Sample
from megatron_plugin.losses.contract import TokenInputs
from megatron_plugin.losses.grpo import LOG_RATIO_MAX
from megatron_plugin.losses.reduction import LossOutput
from megatron_plugin.parallel.context import context_slice
from megatron_plugin.parallel.normaliser import StepMask, sequence_tokens

__all__ = ["is_expert", "source_metrics", "source_names", "step_mask", "token_inputs"]

FIELDS = {f.name for f in fields(TokenInputs)} - {"coefficient", "extra"}
SOURCES = ("expert", "rollout")
MEASURED = ("nll", "entropy", "weight_mean")


def is_expert(sample: Sample) -> bool:
    """Whether the sample comes from an expert: it has a trained token whose column `expert` is not 0."""
    return "expert" in sample.columns and bool((sample.columns["expert"][sample.labels_T != IGNORE_INDEX] != 0).any())


def token_inputs(batch: PackedBatch, coefficient: Tensor) -> TokenInputs:
    """The columns of a batch as fields of TokenInputs, [b, s]: `expert` as bool, names that are no field under `extra`."""
    known = {name: values for name, values in batch.columns.items() if name in FIELDS}
    if "expert" in known:
        known["expert"] = known["expert"] != 0
    extra = {name: values for name, values in batch.columns.items() if name not in FIELDS}
    return TokenInputs(coefficient=coefficient, **known, extra=extra)


def step_mask(batch: PackedBatch, context: dist.ProcessGroup | None) -> StepMask:
    """What the normaliser counts of whole rows on the host, [b, s]: this context-parallel rank's slice of it, [b, s/C].

    Sequences are the segments, their lengths those of the whole rows.  Data weights are left out: they reach the loss as loss_mask.  Every
    place counts as real, padding too: the model is given no padding_mask, so a router of mixture of experts routes all of them."""
    live = ((batch.labels != IGNORE_INDEX) & (batch.loss_weight != 0)).float()
    lengths = sequence_tokens(live, segment_ids=batch.segment_ids)
    expert = batch.columns.get("expert")
    real = torch.ones_like(live, dtype=torch.bool)
    return StepMask(*(None if x is None else context_slice(x, 1, context) for x in (live, expert, lengths, real)))


def source_names(columns: tuple[str, ...]) -> list[str]:
    """Names of what `source_metrics` reports of batches with these columns, the maximum left out."""
    names = [f"{source}_{name}" for source in SOURCES for name in MEASURED] + ["ratio_mean"]
    return [*names, "k3"] if "rollout_logp" in columns else names


def source_metrics(output: LossOutput, columns: Mapping[str, Tensor], live: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """({name: [sum, tokens]} of `source_names`, largest |logp - rollout_logp|) of a micro-batch; nothing waits for the device.

    columns, live: [b, s], those of the labels; live: bool, the tokens that were trained.  The loss's own metrics of one source (expert/...,
    rollout/..., clip_frac) come with the number of that source's tokens."""
    logp = output.per_token.logp
    expert = live & (columns["expert"] != 0) if "expert" in columns else torch.zeros_like(live)
    tokens = {"expert": expert, "rollout": live & ~expert}
    values = {"nll": -logp, "entropy": output.per_token.entropy, "weight_mean": output.per_token.weight}
    pairs = {f"{source}_{name}": _pair(values[name], tokens[source]) for source in SOURCES for name in MEASURED}
    old = columns.get("old_logp")
    ratio = torch.ones_like(logp) if old is None else (logp - old).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    pairs["ratio_mean"] = _pair(ratio, tokens["rollout"])
    for name, total in output.metric_sums.items():
        if (source := name.partition("/")[0]) in tokens or name == "clip_frac":
            pairs[name] = torch.stack([total.float(), tokens.get(source, tokens["rollout"]).sum().float()])
    if "rollout/clip_frac" in pairs:
        pairs["clip_frac"] = pairs["rollout/clip_frac"]
    if "rollout_logp" not in columns:
        return pairs, None
    difference = logp - columns["rollout_logp"]
    pairs["k3"] = _pair(torch.expm1(difference) - difference, tokens["rollout"])
    return pairs, torch.where(tokens["rollout"], difference.abs(), 0.0).amax()


def _pair(values: Tensor, tokens: Tensor) -> Tensor:
    """[sum of `values` over `tokens`, how many]; where, because a masked token's column may hold anything."""
    return torch.stack([torch.where(tokens, values, 0.0).sum().float(), tokens.sum().float()])
