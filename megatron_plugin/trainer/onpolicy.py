"""On-policy training: rollouts with the newest weights, judged, and trained on together with expert demonstrations.

    sample -> judge -> advantages -> (score) -> mix with experts -> train -> send the weights -> sample ...
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from megatron_plugin.config import as_config_error
from megatron_plugin.config.rollout import RolloutConfig
from megatron_plugin.data import IGNORE_INDEX, DataError, RowOrder, Sample
from megatron_plugin.losses.probe import metric_names
from megatron_plugin.parallel.normaliser import Source
from megatron_plugin.rollout.fleet import CONCURRENCY
from megatron_plugin.schedules.mu import MU_PRESETS, mu_schedule
from megatron_plugin.trainer import signals
from megatron_plugin.trainer.batch import Group, expert_sample, rollout_samples
from megatron_plugin.trainer.guard import STRAYS, Guard
from megatron_plugin.trainer.labels import check_labels
from megatron_plugin.trainer.leaders import Leaders
from megatron_plugin.trainer.mixed import MixedRows, mix, train_mixed
from megatron_plugin.trainer.rollouts import Rollouts
from megatron_plugin.trainer.run import Run
from megatron_plugin.trainer.scorer import Scorer
from megatron_plugin.trainer.sources import is_expert
from megatron_plugin.trainer.supervised import nll
from megatron_plugin.trainer.update import optimizer_step

__all__ = ["EmptyStepError", "OnPolicy"]

log = logging.getLogger("megatron_plugin")
WAITS_S = 120.0  # between the tries of a request and the probes of an engine, at most (rollout/slots.py): 47 s and 33 s
MISMATCH = 0.1
"""k3, nats.  Measured: 1e-5 for bf16, 1e-3 one batch ahead, 0.7 for a server with another rotary base."""


class EmptyStepError(RuntimeError):
    """There is nothing to train on; no weight was changed."""

    exit_code = 5


class OnPolicy:
    """Where the loop gets its steps from."""

    def __init__(self, run: Run):
        config = run.config
        if run.position is not None and not {"prompts", "experts"} <= set(run.position):  # before the engines, which take a minute
            raise DataError(f"position of the data: got keys {sorted(run.position)}, expected experts and prompts: the checkpoint is of supervised "
                            "training, which this cannot resume; choose another run_dir, and checkpoint.init for the weights")  # fmt: skip
        self.run, self.rollout, self.guard = run, config.rollout, Guard(run)
        with as_config_error("loss", config.sources.get("loss.name")):
            self.names = metric_names(run.loss, _given(run))
        self.role = config.role
        self.extra = run.loss.twin is None  # a twin reads no extra inputs, and beside any its loss would be formed in PyTorch (losses/objective.py)
        self.experts = run.data.train.samples
        check_labels(self.experts, run.data.vocab_size)
        self.by_source = {sample.source: sample for sample in self.experts}
        self.expert_order = RowOrder(len(self.experts), max(config.data.expert_samples, 1), config.seed, fingerprint=run.data.train.fingerprint())
        self.leaders = Leaders(len(self.rollout.url) or self.rollout.engines, timeout_s=_patience(self.rollout))
        self.scorer = Scorer(run)
        self.pending: list[MixedRows] = []
        self.metrics: dict[str, float] = {}
        self.rollouts = Rollouts(run, self.leaders)
        if run.position is not None:
            self.expert_order.load_state_dict(run.position["experts"])
            self.rollouts.resume(run.position["prompts"])

    def report(self) -> list[str]:
        """What is trained on, for the terminal."""
        lines = self.rollouts.report()
        if self.role.mixes:
            lines.append(f"{self.run.config.data.expert_samples} expert samples a step of {len(self.experts)}: {self.run.data.train.report}")
        return [*lines, *self.scorer.report()]

    def mu(self, step: int) -> float:
        """The share of expert data in the step after `step` of them: 0 without a loss for it."""
        config = self.run.config
        if config.mu is not None:
            schedule = {name: getattr(config.mu, name) for name in ("warmup_steps", "decay_steps", "peak", "valley")}
        elif self.role.mu:
            schedule = MU_PRESETS[self.run.loss.params.get("preset", "phi")]
        else:
            return 0.0
        return mu_schedule(step, **schedule)

    def sources(self, step: int) -> tuple[Source, Source]:
        """(expert, rollout): how each enters the loss of the step after `step` of them."""
        mu = self.mu(step)
        kind = self.rollout.aggregation
        constant = float(self.rollout.max_tokens) if kind == "constant" else None
        both = self.role.mixes and not self.role.mu  # unit coefficients
        expert = Source(share=1.0 if both else mu)
        return expert, Source(share=1.0 if both else 1 - mu, denominator=kind, constant=constant)

    def step(self) -> dict[str, float]:
        """One optimizer step: its means, grad_norm, lr, tokens, and what was measured about the rollouts."""
        run, (expert, rollout) = self.run, self.sources(self.run.step)
        self.metrics = {"mu": expert.share} if self.role.mu else {}
        if not self.pending:
            self.pending = self._batch(with_rollouts=bool(rollout.share))
        begin, mixed = time.perf_counter(), self.pending.pop(0)
        if not any(self.leaders.everyone(_trains(mixed, expert, rollout))):
            raise EmptyStepError("no token of the step is trained, expected completions or demonstrations with one: every completion was refused, empty, or "
                                 "taken out by rollout.correction; rollouts.jsonl has those that came, and the log says why engines refused")  # fmt: skip

        def gradients() -> dict[str, float]:
            return train_mixed(run.config, run.chunks, run.handle, mixed, expert=expert, rollout=rollout, names=[*self.names, STRAYS],
                               watch=self.guard.look)  # fmt: skip

        means = optimizer_step(self.guard, gradients, lambda: _named(mixed, both=bool(expert.share and rollout.share)))
        if self.leaders.leads and means.get("k3", 0.0) > MISMATCH:
            log.warning("step %d: the engine's log-probabilities are k3 = %.2f nats from the trainer's, far beyond rounding and a stale batch: do both "
                        "compute the same model?", run.step, means["k3"])  # fmt: skip
        rows = sum(len(rows) for rows in mixed.micro_batches) * self.leaders.replicas
        self.metrics["perf/train_s"] = time.perf_counter() - begin
        return means | self.metrics | {"tokens": rows * run.config.data.seq_length}

    def _batch(self, *, with_rollouts: bool) -> list[MixedRows]:
        """What the coming optimizer steps train on: one, or rollout.updates where there are rollouts."""
        updates = self.rollout.updates if with_rollouts else 1
        groups: list[Group] = []
        if with_rollouts:
            groups, measured = self.rollouts.batch()
            self.metrics |= measured
        parts = []
        for part in range(updates):
            own = groups[part * len(groups) // updates : (part + 1) * len(groups) // updates]
            samples = [sample for i, group in enumerate(own) for sample in rollout_samples(group, first=i * self.rollout.n, extra=self.extra)]
            self._check(samples)
            with_experts = self.sources(self.run.step + part)[0].share > 0
            parts.append(mix(self.run.config, samples + (self._experts(own) if with_experts else [])))
        if with_rollouts:
            parts = self.scorer.score(parts, several=updates > 1)
            self.metrics |= self.scorer.metrics
        return [self.scorer.filled(part) for part in parts]

    def _check(self, samples: Sequence[Sample]) -> None:
        """Every rank calls it: where one alone raised, the others would wait for it in `mix`.  DataError, elsewhere RemoteError, for a stray label."""
        own = None
        try:
            check_labels(samples, self.run.data.vocab_size)
        except DataError as error:
            own = error
        self.leaders.raise_first(own)

    def _experts(self, groups: Sequence[Group]) -> list[Sample]:
        """This replica's share of the step's expert samples: the next ones in order, or the demonstrations of the groups' prompts."""
        if self.role.demonstrations:
            return [expert_sample(self.by_source[group.judged.prompt.source], group.demonstration, extra=self.extra) for group in groups]
        chosen, replicas = self.expert_order.next_step(), self.leaders.replicas
        mine = chosen[self.leaders.replica * len(chosen) // replicas : (self.leaders.replica + 1) * len(chosen) // replicas]
        return [expert_sample(self.experts[i], extra=self.extra) for i in mine]

    def evaluate(self, *, last: bool) -> dict[str, float]:
        """Held-out rewards, greedy and sampled, and plain NLL."""
        metrics = self.rollouts.evaluate()
        for held_out in self.run.data.evals:
            metrics[f"eval/{held_out.name}_nll"] = nll(self.run, held_out, self.names)
        return metrics

    def position(self) -> dict[str, Any]:
        """Of the data.  checkpoint.interval, and train.eval_interval beside checkpoint.best, are multiples of rollout.updates, so that a checkpoint lies
        between two rollout batches and a run that resumes draws the samples of the undisturbed one (max_staleness=1 too: Rollouts._pauses).  Only that
        of the last step, or of a signal, can lie between the updates of one batch: it points behind it, and what is left of the batch is not trained on."""
        if self.pending and (self.guard.signal or signals.asked()) and self.leaders.leads and self.leaders.index == 0:
            log.warning("step %d is saved between the updates of a rollout batch: the %d that are left of rollout.updates=%d are not trained on, also by "
                        "the run that resumes", self.run.step, len(self.pending), self.rollout.updates)  # fmt: skip
        return {"prompts": self.rollouts.position(), "experts": self.expert_order.state_dict(), "guard": self.guard.state()}

    def close(self) -> None:
        self.rollouts.close()


def _named(mixed: MixedRows, *, both: bool) -> list[list[str]]:
    """file:line of the samples in each micro-batch; of all in one list where a source was taken out, and the rest packed anew."""
    if not both:
        return [[sample.source for sample in mixed.samples]]
    return [[name for row in rows for name in mixed.rows.sources(row)] for rows in mixed.micro_batches]


def _trains(mixed: MixedRows, expert: Source, rollout: Source) -> bool:
    """Whether a sample of this rank has a token that the step trains on."""
    live = [sample for sample in mixed.samples if (expert if is_expert(sample) else rollout).share]
    return any(bool(((sample.labels_T != IGNORE_INDEX) & (sample.weight_T != 0)).any()) for sample in live)


def _given(run: Run) -> frozenset[str]:
    """Inputs that a loss may ask for in this run."""
    rollout, params = run.config.rollout, run.loss.params
    made = {
        "old_logp": rollout.updates > 1, "ref_logp": bool(params.get("kl", 0.0)), "extra.entropy": params.get("entropy_scope", "token") != "token"
    }  # fmt: skip
    extra = ("extra.reward", "extra.sequence") if run.loss.twin is None else ()
    return frozenset({"advantage", "expert", "rollout_logp", *extra, *(name for name, is_made in made.items() if is_made)})


def _patience(rollout: RolloutConfig) -> float:
    """Seconds that ranks wait for a leader: the longest that a round of restarts, generation and judging can take by the limits of each part."""
    waves = 3 + rollout.prompts / CONCURRENCY  # a prompt may miss three deadlines
    judging = rollout.prompts * rollout.n * rollout.reward_timeout_s
    return (1 + rollout.max_restarts) * (waves * rollout.timeout_s + rollout.start_timeout_s + WAITS_S) + judging
