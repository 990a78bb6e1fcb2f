"""Supervised training: rows of expert data, `train.global_batch` of them a step."""

from __future__ import annotations

from typing import Any

from megatron_plugin.config import ConfigError, as_config_error
from megatron_plugin.data import DataError, RowOrder, eval_steps, shard
from megatron_plugin.data.errors import some_of
from megatron_plugin.hooks.mcore import groups
from megatron_plugin.losses.probe import metric_names
from megatron_plugin.trainer import signals
from megatron_plugin.trainer.answers import accuracy
from megatron_plugin.trainer.datasets import EvalSet
from megatron_plugin.trainer.guard import STRAYS, Guard
from megatron_plugin.trainer.labels import check_labels
from megatron_plugin.trainer.run import Run
from megatron_plugin.trainer.step import run_rows
from megatron_plugin.trainer.update import optimizer_step

__all__ = ["Supervised", "nll"]


class Supervised:
    """Where the loop gets its steps from."""

    def __init__(self, run: Run):
        config, rows = run.config, run.data.train
        if config.mu is not None:
            raise ConfigError("the supervised trainer has one source of tokens and no use for a schedule of mu; leave the section out", "mu")
        with as_config_error("loss", config.sources.get("loss.name")):
            self.names = metric_names(run.loss)
        self.run, self.rows, self.guard = run, rows, Guard(run)
        check_labels(rows.samples, run.data.vocab_size)
        self.order = RowOrder(len(rows), config.train.global_batch, config.seed, fingerprint=rows.fingerprint())
        if run.position is not None:
            self.order.load_state_dict(run.position)

    def report(self) -> list[str]:
        """What is trained on, for the terminal."""
        return [f"{self.run.config.loss_name} on {len(self.rows)} rows: {self.rows.report}; vocabulary {self.run.data.vocab_size}"]

    def step(self) -> dict[str, float]:
        """One optimizer step: its means, grad_norm, lr and tokens (all of the step, with and without a loss)."""
        run, rows = self.run, self.order.next_step()
        if not any(self.rows.loss_tokens(row) for row in rows):
            names = [name for row in rows for name in self.rows.sources(row)]
            raise DataError(f"step {run.step + 1} has no token with a loss in its {len(rows)} rows: {some_of(names)}")

        def gradients() -> dict[str, float]:
            return run_rows(run.config, run.chunks, run.handle, self.rows, rows, [*self.names, STRAYS], train=True, watch=self.guard.look)

        means = optimizer_step(self.guard, gradients, lambda: self._by_micro_batch(rows))
        return means | {"tokens": len(rows) * run.config.data.seq_length}

    def evaluate(self, *, last: bool) -> dict[str, float]:
        """Plain NLL of every held-out set, whatever the loss; after the last step also the share answered right."""
        metrics, config = {}, self.run.config
        for held_out in self.run.data.evals:
            metrics[f"eval/{held_out.name}_nll"] = nll(self.run, held_out, self.names)
            if last and config.data.eval_answers:
                conversations = held_out.conversations[: config.data.eval_answers]
                with signals.breaking():  # everything is saved by now
                    share, asked = accuracy(config, self.run.chunks, self.run.data.tokenizer, conversations, self.run.data.vocab_size)
                metrics |= {f"eval/{held_out.name}_accuracy": share, f"eval/{held_out.name}_asked": float(asked)} if asked else {}
        return metrics

    def position(self) -> dict[str, Any]:
        return self.order.state_dict() | {"guard": self.guard.state()}

    def close(self) -> None:
        """Nothing is held."""

    def _by_micro_batch(self, rows: list[int]) -> list[list[str]]:
        """file:line of the samples in each micro-batch of this replica."""
        dp = groups().dp
        mine = shard(rows, dp_rank=dp.rank(), dp_size=dp.size(), micro_batch=self.run.config.train.micro_batch)
        return [[name for row in micro_batch for name in self.rows.sources(row)] for micro_batch in mine]


def nll(run: Run, held_out: EvalSet, names: list[str]) -> float:
    """Mean NLL of a held-out set's tokens, nats.  LeaveError where a signal came."""
    total = tokens = 0.0
    for rows in eval_steps(len(held_out.rows), run.config.train.global_batch):
        signals.leave_if_asked()
        means = run_rows(run.config, run.chunks, run.handle, held_out.rows, rows, names, train=False)
        if means["num_tokens"]:
            total, tokens = total + means["nll"] * means["num_tokens"], tokens + means["num_tokens"]
    return total / tokens
