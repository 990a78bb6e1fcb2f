"""Supervised training: rows of expert data, `train.global_batch` of them a step."""

from __future__ import annotations

from typing import Any

from megatron_plugin.config import ConfigError, as_config_error
from megatron_plugin.data import DataError, RowOrder, eval_steps
from megatron_plugin.losses.probe import metric_names
from megatron_plugin.trainer.answers import accuracy
from megatron_plugin.trainer.datasets import EvalSet
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
        self.run, self.rows = run, rows
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
            raise DataError(f"step {run.step + 1} has no token with a loss in its {len(rows)} rows: {self._sources(rows)}")

        def gradients() -> dict[str, float]:
            return run_rows(run.config, run.chunks, run.handle, self.rows, rows, self.names, train=True)

        means = optimizer_step(run, gradients, lambda: self._sources(rows))
        return means | {"tokens": len(rows) * run.config.data.seq_length}

    def evaluate(self, *, last: bool) -> dict[str, float]:
        """Plain NLL of every held-out set, whatever the loss; after the last step also the share answered right."""
        metrics, config = {}, self.run.config
        for held_out in self.run.data.evals:
            metrics[f"eval/{held_out.name}_nll"] = nll(self.run, held_out, self.names)
            if last and config.data.eval_answers:
                conversations = held_out.conversations[: config.data.eval_answers]
                share, asked = accuracy(config, self.run.chunks, self.run.data.tokenizer, conversations, self.run.data.vocab_size)
                metrics |= {f"eval/{held_out.name}_accuracy": share, f"eval/{held_out.name}_asked": float(asked)} if asked else {}
        return metrics

    def position(self) -> dict[str, Any]:
        return self.order.state_dict()

    def close(self) -> None:
        """Nothing is held."""

    def _sources(self, rows: list[int]) -> str:
        names = [name for row in rows for name in self.rows.sources(row)]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def nll(run: Run, held_out: EvalSet, names: list[str]) -> float:
    """Mean NLL of a held-out set's tokens, nats."""
    total = tokens = 0.0
    for rows in eval_steps(len(held_out.rows), run.config.train.global_batch):
        means = run_rows(run.config, run.chunks, run.handle, held_out.rows, rows, names, train=False)
        if means["num_tokens"]:
            total, tokens = total + means["nll"] * means["num_tokens"], tokens + means["num_tokens"]
    return total / tokens
