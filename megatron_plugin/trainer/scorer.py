"""What losses need to know of every token before the step: log-probabilities under the old and the reference policy, entropies, corrections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.config.rollout_checks import CORRECTIONS
from megatron_plugin.data import IGNORE_INDEX, Sample
from megatron_plugin.hooks.mcore import device, groups
from megatron_plugin.losses.advantages import sequence_weight
from megatron_plugin.losses.contract import TokenLoss
from megatron_plugin.trainer.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from megatron_plugin.trainer.mixed import MixedRows, Scored, score
from megatron_plugin.trainer.reference import Reference
from megatron_plugin.trainer.run import Run
from megatron_plugin.trainer.sources import is_expert

__all__ = ["Scorer"]


class Scorer:
    """Adds columns to mixed rows, by forward passes in the training packing.  With one update per rollout batch and nothing that needs it,
    it does nothing: the policy is then the old one."""

    def __init__(self, run: Run):
        self.run, self.rollout = run, run.config.rollout
        self.reference = _reference(run) if run.loss.params.get("kl", 0.0) else None
        self.scope = run.loss.params.get("entropy_scope", "token")
        self.corrects = self.rollout.correction != "none"
        self.metrics: dict[str, float] = {}
        """Of the last batch: rollout/corrected_frac, the share of completions that rollout.correction took out or truncated."""
        self.needed = [name for name, wanted in (("rollout_logp", _corrects_tokens(run.loss)), ("ref_logp", self.reference is not None)) if wanted]

    def report(self) -> list[str]:
        """What the reference policy costs, for the terminal."""
        return [] if self.reference is None else [f"reference policy: {self.reference.bytes / 2**20:.1f} MiB on each rank's host, swapped in once a batch"]

    def score(self, parts: Sequence[MixedRows], *, several: bool) -> list[MixedRows]:
        """The parts of a rollout batch, each one optimizer step, before the first of them; `several` steps need old_logp."""
        parts, self._cut = list(parts), torch.zeros(2)
        if several or self.corrects or self.scope != "token":
            parts = [self._with_own(part, several=several) for part in parts]
        if self.reference is not None:
            with self.reference.swapped_in():
                parts = [part.with_columns("ref_logp", [found.logp_T for found in self._scored(part)]) for part in parts]
        if self.corrects:
            cut = self._cut.to(device())
            dist.all_reduce(cut, group=groups().dp)
            self.metrics = {"rollout/corrected_frac": float(cut[0] / cut[1].clamp(min=1))}
        return parts

    def filled(self, part: MixedRows) -> MixedRows:
        """The part with zeros in the columns that the loss asks for and only rollouts have, where no rank has one: experts do not read them."""
        for name in self.needed:
            if name not in part.rows.columns:
                part = part.with_columns(name, [torch.zeros(len(sample.tokens_T)) for sample in part.samples])
        return part

    def _scored(self, part: MixedRows) -> list[Scored]:
        return score(self.run.config, self.run.chunks, self.run.handle, part)

    def _with_own(self, part: MixedRows, *, several: bool) -> MixedRows:
        found = self._scored(part)
        if several:
            part = part.with_columns("old_logp", [x.logp_T for x in found])
        if self.scope != "token":
            part = part.with_columns("entropy", self._entropy(part, found))
        if self.corrects:
            samples = [sample if is_expert(sample) else self._corrected(sample, x) for sample, x in zip(part.samples, found, strict=True)]
            part = replace(part, rows=replace(part.rows, samples=tuple(samples)))
        return part

    def _entropy(self, part: MixedRows, found: Sequence[Scored]) -> list[Tensor]:
        """Mean entropy of each sample's trained tokens, or of those of its source in the whole step, at every token."""
        live = [sample.labels_T != IGNORE_INDEX for sample in part.samples]
        sums = torch.tensor([[float(x.entropy_T[m].sum()), float(m.sum())] for x, m in zip(found, live, strict=True)]).view(-1, 2)
        if self.scope == "batch":
            experts = torch.tensor([is_expert(sample) for sample in part.samples], dtype=torch.bool)
            totals = torch.stack([sums[experts].sum(0), sums[~experts].sum(0)]).to(device())
            dist.all_reduce(totals, group=groups().dp)
            sums = totals.cpu()[(~experts).long()]
        return [torch.full((len(m),), float(total / count.clamp(min=1))) for (total, count), m in zip(sums, live, strict=True)]

    def _corrected(self, sample: Sample, found: Scored) -> Sample:
        """The sample with the weight of its whole sequence; 0 takes it out of the loss and of the count that the loss is divided by."""
        live = sample.labels_T != IGNORE_INDEX
        weight = sequence_weight(
            found.logp_T[live], sample.columns["rollout_logp"][live], mode=self.rollout.correction, bound=self.rollout.correction_bound,
            advantage=float(sample.columns["advantage"][live][0]),
        )  # fmt: skip
        bound = self.rollout.correction_bound if self.rollout.correction == "sequence_tis" else 0.0
        self._cut += torch.tensor([float(weight == bound), 1.0])
        return replace(sample, weight_T=sample.weight_T * weight)


def _corrects_tokens(loss: TokenLoss) -> bool:
    return any(name in loss.params for name in CORRECTIONS)


def _reference(run: Run) -> Reference:
    """The weights that the run began with, also in a run that is resumed."""
    reference, init = Reference(run.chunks), run.config.checkpoint.init
    if init:
        with reference.swapped_in():
            load_checkpoint(find_checkpoint(init), run.chunks)
    elif run.step:
        raise CheckpointError(f"got loss.kl={run.loss.params['kl']} in a run resumed at step {run.step} without checkpoint.init, expected the weights "
                              "it began with: name them in checkpoint.init")  # fmt: skip
    return reference
