"""Nothing is applied that is not a number, and all ranks agree on it: one all-reduce of five numbers a step.

    guard = Guard(run)
    means = run_rows(..., watch=guard.look)             # what each micro-batch gave is kept until the step is over
    votes = guard.vote(means)                           # on the device; read once the host waits for the gradient norm anyway
    norm = float(optimizer.get_grad_norm())
    verdict = votes.verdict(norm)                       # the same on every rank

The gradients are read once more for it, no faster or slower than for their norm; the host waits for nothing that it did not wait for before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.data import IGNORE_INDEX, PackedBatch
from megatron_plugin.hooks.mcore import device, groups
from megatron_plugin.losses.reduction import LossOutput
from megatron_plugin.trainer import signals
from megatron_plugin.trainer.perf import memory_gib
from megatron_plugin.trainer.run import Run
from megatron_plugin.trainer.spikes import Spikes

__all__ = ["STRAYS", "Guard", "Seen", "Verdict", "Votes"]

INF = float("inf")
STRAYS = "stray_labels"
WATCHED = {True: ("lm loss", "nll"), False: ("nll",)}
"""Means that are looked at for spikes, by whether training is supervised: with advantages a loss has no size, its tokens' surprise has."""


@dataclass(frozen=True)
class Seen:
    """One micro-batch of the step on the last pipeline stage; this rank's slice [b, s/C] of it."""

    batch: PackedBatch
    live: Tensor
    """bool, the tokens with a loss."""
    loss: Tensor
    """fp32, of each token, without its coefficient."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of the step, the same on every rank."""

    grad_norm: float
    loss: bool
    """Whether the loss is not a number on some rank."""
    gradient: bool
    """Whether the gradient is not."""
    spike: bool
    signal: int
    """What ends the run after this step; 0: nothing."""
    memory: float = 0.0
    """GiB, of the rank that has used most (perf.py)."""

    @property
    def finite(self) -> bool:
        return not (self.loss or self.gradient)


class Votes:
    """Under way: the host copy is complete once the host has waited for anything that was launched later."""

    def __init__(self, mine: Sequence[float | Tensor]):
        cuda = torch.cuda.is_available()
        votes = torch.stack([torch.as_tensor(vote, dtype=torch.float32).to(device(), non_blocking=True) for vote in mine])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)  # with NCCL the host goes on at once
        self._host = torch.empty(votes.shape, pin_memory=cuda)
        self._host.copy_(votes, non_blocking=True)

    def verdict(self, grad_norm: float) -> Verdict:
        """`grad_norm` is asked for because whoever has it as a number has waited for the device."""
        loss, gradient, spike, number, memory = self._host.tolist()
        return Verdict(grad_norm, bool(loss), bool(gradient) or not math.isfinite(grad_norm), bool(spike), int(number), memory)


class Guard:
    """Of one run: what it has seen of the losses, and how many steps it has held back."""

    def __init__(self, run: Run):
        saved = (run.position or {}).pop("guard", None) or {}
        self.run, self.train = run, run.config.train
        self.names = WATCHED[run.config.rollout is None]
        self.spikes = {name: Spikes(self.train.spike_factor, saved.get(name, ())) for name in self.names}
        self.in_a_row, self.skipped = saved.get("in_a_row", 0), saved.get("skipped", 0)
        self.signal = 0
        """What asked for the end of the run, as of the last step."""
        self.seen: list[Seen] = []
        self.outputs: dict[int, list[Tensor]] = {}
        """By chunk of this rank that has no head: the largest magnitude that each micro-batch left it with."""
        for number, chunk in enumerate(run.chunks[:-1] if run.handle.active else run.chunks):  # the head is in the last one
            chunk.register_forward_hook(partial(self._look_at_chunk, number))

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run judges as the undisturbed one."""
        return {"in_a_row": self.in_a_row, "skipped": self.skipped} | {name: list(spikes.seen) for name, spikes in self.spikes.items()}

    def begin(self) -> None:
        """A new step: what was kept of the last one goes."""
        self.seen, self.outputs = [], {}

    def look(self, output: LossOutput, batch: PackedBatch, live: Tensor) -> dict[str, Tensor]:
        """`measure` of run_step: keeps the micro-batch, and counts labels that no vocabulary has.  No host sync.

        On the CPU the op has raised for such a label; on a GPU it made its loss, and so the step, not a number."""
        self.seen.append(Seen(batch, live, output.per_token.loss.detach()))
        stray = live & (batch.labels != IGNORE_INDEX) & ((batch.labels < 0) | (batch.labels >= self.run.data.vocab_size))
        return {STRAYS: torch.stack([stray.sum(), live.sum()]).float()}

    def vote(self, means: Mapping[str, float]) -> Votes:
        """Collective, every rank of the job, once gradients are final.  `means` of the step."""
        lost = not math.isfinite(means["lm loss"])
        spike = not lost and any(spikes.is_spike(means[name]) for name, spikes in self.spikes.items())
        return Votes([float(lost), self._gradient_lost(), float(spike), float(signals.asked()), memory_gib()])

    def settle(self, verdict: Verdict, means: Mapping[str, float]) -> dict[str, float]:
        """Counts the step; its metrics."""
        self.signal = verdict.signal
        if verdict.finite:
            self.in_a_row = 0
            for name, spikes in self.spikes.items():
                spikes.add(means[name])
        else:
            self.in_a_row += 1
        held_back = not verdict.finite or (verdict.spike and self.train.skip_spikes)
        self.skipped += held_back
        strays = means.get(STRAYS, 0.0) * means["num_tokens"]  # of a mean, or nan where there is no token
        return {"guard/skipped_steps": float(self.skipped), "train/spike": float(verdict.spike), "perf/memory_gib": verdict.memory,
                "guard/stray_labels": float(round(strays)) if math.isfinite(strays) else 0.0}  # fmt: skip

    def found(self) -> dict[str, Any]:
        """After a step that is not finite: what this rank saw of it, for people.  Waits for the device."""
        ours = groups()
        bad = [i for i, seen in enumerate(self.seen) if not seen.loss[seen.live].isfinite().all()]
        by_chunk = {chunk: [i for i, largest in enumerate(own) if not torch.isfinite(largest)] for chunk, own in sorted(self.outputs.items())}
        by_chunk[len(self.run.chunks) - 1] = by_chunk.get(len(self.run.chunks) - 1, []) + bad
        first = next((chunk for chunk, found in by_chunk.items() if found), 0)  # the later ones got it from there
        return {
            "rank": dist.get_rank(), "stage": first * ours.pp.size() + ours.pp.rank(), "replica": ours.dp.rank(), "micro_batches": by_chunk.get(first, []),
            "places": {str(i): (~seen.loss.isfinite() & seen.live).nonzero().tolist()[:8] for i, seen in enumerate(self.seen) if i in bad},
            "losses": [float((seen.loss * seen.live).nansum()) if i not in bad else None for i, seen in enumerate(self.seen)],
            "gradient": bool(self._gradient_lost()),
            "weights": not all(p.isfinite().all() for chunk in self.run.chunks for p in chunk.parameters()),
        }  # fmt: skip

    def _gradient_lost(self) -> Tensor:
        """0-d: 1 where a gradient of this rank is not finite.  The norm would not see all: of tensors that tensor-parallel ranks hold alike it counts
        one, and without the distributed optimizer it never leaves the data-parallel replica."""
        found = [buffer.grad_data for chunk in self.run.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        largest = [torch.linalg.vector_norm(data, INF) for data in found if data.numel()]
        return (~torch.stack(largest).isfinite().all()).float() if largest else torch.zeros((), device=device())

    def _look_at_chunk(self, number: int, module, arguments, output) -> None:
        if torch.is_grad_enabled() and isinstance(output, Tensor):
            self.outputs.setdefault(number, []).append(torch.linalg.vector_norm(output.detach(), INF).float())
