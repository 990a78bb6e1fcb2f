"""What a person sees of a run: a line per step, metrics.jsonl, TensorBoard and what `log` names.  Written by rank 0 only."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_plugin.report.lines import read_metrics
from megatron_plugin.rollout.log import append_whole
from megatron_plugin.trainer.manifest import write_text
from megatron_plugin.trainer.step_line import WIDTH, Clock, step_line
from megatron_plugin.trainer.trackers import close_all

if TYPE_CHECKING:
    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter

    from megatron_plugin.trainer.trackers import Tracker

__all__ = ["RunLog", "step_metrics"]

RENAMED = {"lm loss": "loss", "weight": "weight_mean", "cll": "cll_mean", "phi": "phi_mean", "expert/phi": "phi_mean"}
TWICE = ("rollout/ratio", "rollout/clip_frac")  # chord's names of ratio_mean and clip_frac
OF_ROLLOUTS = ("ratio_mean", "logp_diff_max", "k3")  # measured by the trainer, about the rollouts
BAR = 20  # columns


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

    def __init__(self, run_dir: str | Path, *, steps: int, resumed_at: int, leader: bool, trackers: Callable[[], Sequence[Tracker]] = list):
        """trackers: makes those that get every step too; called on rank 0."""
        self.leader, self.steps = leader, steps
        if not leader:
            return
        from torch.utils.tensorboard import SummaryWriter

        run_dir = Path(run_dir)
        # A run killed after its last checkpoint has logged steps it will now do again
        kept = [line for line in read_metrics(run_dir) if line["step"] <= resumed_at]
        self._path, self.failed, self._closed = run_dir / "metrics.jsonl", 0, False
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board: SummaryWriter | None = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_at + 1)
        self._console, self._clock, self._trackers = _terminal(), Clock(), trackers()

    def say(self, text: str) -> None:
        if self.leader:
            self._console.print(text, markup=False) if self._console else print(text, flush=True)

    def step(self, step: int, metrics: dict[str, float], *, show: bool) -> None:
        """Record one step, log/... in it if anything that records has failed; `show` prints its line."""
        if not self.leader:
            return
        if self.failed:
            metrics = metrics | {"log/failed": float(self.failed)}
        metrics = metrics | {f"log/{tracker.name}_failed": float(tracker.failed) for tracker in self._trackers if tracker.failed}
        self._write(step, metrics)
        self._to_board(lambda board: [board.add_scalar(name, value, step) for name, value in metrics.items()])
        for tracker in self._trackers:
            tracker.log(step, metrics)
        self._tell_news()
        if step:
            self._clock.tick()
        if show:
            self._show(step, metrics)

    def close(self, *, failed: bool = False) -> None:
        """Everything is passed on, or counted as lost.  A second call does nothing."""
        if self.leader and not self._closed:
            self._closed = True
            self._to_board(lambda board: board.close())
            close_all(self._trackers, failed=failed)
            self._tell_news()

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        left = self._clock.left(self.steps - step)
        if self._console is None:
            print(step_line(step, self.steps, metrics, left=left, width=WIDTH), flush=True)
            return
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        # A line of its own and no bar that is redrawn in place: what NCCL, vLLM or a warning writes meanwhile would land in it, and it in theirs
        columns = self._console.width
        parts = self._console.render(ProgressBar(self.steps, step, width=BAR)) if columns > 4 * BAR else ()
        bar = Text.assemble(*((part.text, part.style or "") for part in parts if not part.control))
        bar.rstrip()
        line = step_line(step, self.steps, metrics, left=left, width=min(WIDTH, columns) - (len(bar) + 1 if bar else 0))
        self._console.print(Text.assemble(bar, " " if bar else "", self._console.render_str(line, markup=False, highlight=True)), no_wrap=True, overflow="crop")

    def _tell_news(self) -> None:
        for tracker in self._trackers:
            if text := tracker.news():
                self.say(text)

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


def _terminal() -> Console | None:
    """Where a person looks on; None for a file or a pipe, as under torchrun --redirects.  rich obeys NO_COLOR and TERM=dumb itself."""
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console(highlight=True)
