"""What a person sees of a step: one line, of at most so many columns whatever was measured.

    step  7/20  loss 1.2345  nll 1.2345  p 0.412  ...  tok/s 5,120  left 0:00:42

Where there is no room, what counts least is left out: metrics.jsonl has everything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

__all__ = ["WIDTH", "Clock", "step_line"]

WIDTH = 160
"""Columns of a line in a log."""
LONGEST_VALUE = 10
SHOWN = {  # metric -> (heading, format); the line has them in this order
    "train/loss": ("loss", ".4f"), "train/nll": ("nll", ".4f"), "train/token_prob": ("p", ".3f"), "train/entropy": ("H", ".3f"),
    "train/weight_mean": ("w", ".3f"), "train/mu": ("mu", ".2f"), "rollout/reward_mean": ("reward", ".3f"), "rollout/len_mean": ("len", ".0f"),
    "perf/generate_s": ("gen_s", ".1f"), "perf/train_s": ("train_s", ".1f"), "perf/sync_s": ("sync_s", ".2f"), "train/grad_norm": ("gnorm", ".3f"),
    "train/lr": ("lr", ".1e"), "perf/tokens_per_s": ("tok/s", ",.0f"), "perf/mfu": ("mfu", ".1%"), "perf/memory_gib": ("GiB", ".1f"),
}  # fmt: skip
WHEN_NOT_ZERO = {  # the same, where there are any
    "train/spike": ("SPIKE", ".0f"), "guard/skipped_steps": ("skipped", ".0f"), "guard/stray_labels": ("strays", ".0f"),
    "log/failed": ("unlogged", ".0f"), "checkpoint/failed": ("unsaved", ".0f"),
    "rollout/zero_groups": ("equal", ".2f"), "rollout/truncated_frac": ("cut", ".2f"), "rollout/empty": ("empty", ".0f"), "rollout/refused": ("refused", ".0f"),
    "rollout/reward_failures": ("unjudged", ".0f"), "rollout/lost_engines": ("lost", ".0f"), "rollout/suspected": ("suspect", ".0f"),
}  # fmt: skip
FIRST_TO_GO = ("perf/sync_s", "perf/memory_gib", "perf/train_s", "train/lr", "perf/generate_s", "train/weight_mean", "rollout/zero_groups", "perf/mfu", "train/entropy",
               "train/token_prob", "rollout/truncated_frac", "rollout/len_mean", "train/grad_norm", "perf/tokens_per_s", "train/mu")  # fmt: skip
"""Left out one after the other where there is no room; then evaluations, from the last; what is not named here and the step itself stay longest."""


def step_line(step: int, steps: int, metrics: Mapping[str, float], *, left: str = "", width: int = WIDTH) -> str:
    """The line of one step, without a line end.  `left`: the time that the run still takes, in words of `Clock.left`."""
    head = f"step {step:>{len(str(steps))}}/{steps}"
    cells = {name: f"{heading} {_number(metrics[name], spec)}" for name, (heading, spec) in SHOWN.items() if name in metrics}
    cells |= {name: f"{heading} {_number(metrics[name], spec)}" for name, (heading, spec) in WHEN_NOT_ZERO.items() if metrics.get(name)}
    evaluated = sorted((name for name in metrics if name.startswith("eval/")), key=lambda name: name.endswith("_asked"))
    cells |= {name: f"{name} {_number(metrics[name], '.4f')}" for name in evaluated}
    cells |= {"left": f"left {left}"} if left else {}
    room = width - len(head)
    for name in (*FIRST_TO_GO, *reversed(evaluated), "left", *reversed(SHOWN), *WHEN_NOT_ZERO):
        if sum(2 + len(cell) for cell in cells.values()) <= room:
            break
        cells.pop(name, None)
    return "  ".join([head, *cells.values()])[:width]


def _number(value: float, spec: str) -> str:
    text = format(value, spec)
    return text if len(text) <= LONGEST_VALUE else format(value, ".3g")


class Clock:
    """How long the run still takes, by the mean of its last steps with all that lies between them: checkpoints, evaluations."""

    def __init__(self, last: int = 50):
        self._ends: deque[float] = deque([time.monotonic()], maxlen=last + 1)

    def tick(self) -> None:
        """A step is over."""
        self._ends.append(time.monotonic())

    def left(self, steps: int) -> str:
        """Of `steps` more, as h:mm:ss; "" before the first step is over."""
        if len(self._ends) < 2 or steps <= 0:
            return ""
        seconds = round(steps * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
