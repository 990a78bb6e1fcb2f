"""What a person sees of a run: a line per step, metrics.jsonl, TensorBoard.  Written by rank 0 only."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_plugin.report.lines import read_metrics
from megatron_plugin.rollout.log import append_whole
from megatron_plugin.trainer.manifest import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["RunLog", "step_metrics"]

SHOWN = {  # metric -> (heading, format): the line on the terminal
    "train/loss": ("loss", ".4f"), "train/nll": ("nll", ".4f"), "train/token_prob": ("p", ".3f"), "train/entropy": ("H", ".3f"),
    "train/weight_mean": ("w", ".3f"), "train/mu": ("mu", ".2f"), "rollout/reward_mean": ("reward", ".3f"), "rollout/len_mean": ("len", ".0f"),
    "perf/generate_s": ("gen_s", ".1f"), "perf/train_s": ("train_s", ".1f"), "perf/sync_s": ("sync_s", ".2f"), "train/grad_norm": ("gnorm", ".3f"), "train/lr": ("lr", ".1e"), "perf/tokens_per_s": ("tok/s", ",.0f"),
}  # fmt: skip
WHEN_NOT_ZERO = {  # the same, where there are any
    "train/spike": ("SPIKE", ".0f"), "guard/skipped_steps": ("skipped", ".0f"), "guard/stray_labels": ("strays", ".0f"),
    "rollout/zero_groups": ("equal", ".2f"), "rollout/truncated_frac": ("cut", ".2f"), "rollout/empty": ("empty", ".0f"), "rollout/refused": ("refused", ".0f"),
    "rollout/reward_failures": ("unjudged", ".0f"), "rollout/lost_engines": ("lost", ".0f"), "rollout/suspected": ("suspect", ".0f"),
}  # fmt: skip
RENAMED = {"lm loss": "loss", "weight": "weight_mean", "cll": "cll_mean", "phi": "phi_mean", "expert/phi": "phi_mean"}
TWICE = ("rollout/ratio", "rollout/clip_frac")  # chord's names of ratio_mean and clip_frac
OF_ROLLOUTS = ("ratio_mean", "logp_diff_max", "k3")  # measured by the trainer, about the rollouts


def step_metrics(means: dict[str, float], *, seconds: float, counts: dict[str, float]) -> dict[str, float]:
    """The house's metric names from the means of a step; those that have a slash in their name keep it.

    means["tokens"]: all tokens of the step, with and without a loss.  counts: data/..., what the data lost on the way."""
    named = {RENAMED.get(name, name): value for name, value in means.items() if name not in TWICE}
    weight_sq, tokens = named.pop("weight_sq"), named.pop("tokens")
    metrics = {name if "/" in name else f"rollout/{name}" if name in OF_ROLLOUTS else f"train/{name}": value for name, value in named.items()}
    metrics["train/weight_ess"] = named["weight_mean"] ** 2 / weight_sq if weight_sq else 0.0  # share of tokens that carry the weight
    return metrics | {"perf/step_s": seconds, "perf/tokens_per_s": tokens / seconds} | counts


class RunLog:
    """Rank 0's record of a run; on the other ranks it does nothing."""

    def __init__(self, run_dir: str | Path, *, steps: int, resumed_at: int, leader: bool):
        self.leader, self.steps = leader, steps
        if not leader:
            return
        from torch.utils.tensorboard import SummaryWriter

        run_dir = Path(run_dir)
        # A run killed after its last checkpoint has logged steps it will now do again
        kept = [line for line in read_metrics(run_dir) if line["step"] <= resumed_at]
        self._path, self.failed = run_dir / "metrics.jsonl", 0
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board: SummaryWriter | None = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_at + 1)
        self._console = None
        if sys.stdout.isatty():
            from rich.console import Console

            self._console = Console(highlight=True)

    def say(self, text: str) -> None:
        if self.leader:
            self._console.print(text) if self._console else print(text, flush=True)

    def step(self, step: int, metrics: dict[str, float], *, show: bool) -> None:
        """Record one step, log/failed in it if the disk has refused any; `show` prints its line."""
        if not self.leader:
            return
        if self.failed:
            metrics = metrics | {"log/failed": float(self.failed)}
        self._write(step, metrics)
        self._to_board(lambda board: [board.add_scalar(name, value, step) for name, value in metrics.items()])
        if show:
            width = len(str(self.steps))
            cells = [f"{heading} {format(metrics[name], spec)}" for name, (heading, spec) in SHOWN.items() if name in metrics]
            cells += [f"{heading} {format(metrics[name], spec)}" for name, (heading, spec) in WHEN_NOT_ZERO.items() if metrics.get(name)]
            evaluated = [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval/")]
            self.say(f"step {step:>{width}}/{self.steps}  " + "  ".join(cells + evaluated))

    def close(self) -> None:
        if self.leader:
            self._to_board(lambda board: board.close())

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl; a disk that refuses it is no reason to stop."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        try:
            with open(self._path, "ab", buffering=0) as file:  # opened anew: nothing that was refused is held back in a buffer
                append_whole(file, (json.dumps({"step": step} | finite) + "\n").encode())
        except OSError as error:
            if not self.failed:
                self.say(f"{self._path} cannot be written, training goes on and log/failed counts the steps that are not in it: {error}")
            self.failed += 1

    def _to_board(self, act: Callable[[SummaryWriter], object]) -> None:
        """TensorBoard's thread is over once a write has failed, and does not begin again."""
        try:
            if self._board is not None:
                act(self._board)
        except OSError as error:
            self._board = None
            self.say(f"TensorBoard's files cannot be written and end here, metrics.jsonl goes on: {error}")
