"""What `megatron-plugin realign` says: while it runs, and in the end of everything that was realigned so far."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_plugin.data.scores import read_scores

__all__ = ["Ticker", "mean_cll", "summary"]

SAY_S = 10.0  # between lines where there is no terminal to draw a bar on
KINDS = ("own", "hinted", "rejected")


class Ticker:
    """A bar on a terminal, else a line now and then."""

    def __init__(self, total: int, done: int, console: Console | None = None):
        """total, done: lines of the data."""
        self.console = console or Console()
        self.begun = self.said = time.perf_counter()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.total, self.task = total, self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Ticker:
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def say(self, lines: int, realigner: Any) -> None:
        """After a batch.  lines: of the data, done."""
        now = time.perf_counter()
        text = ", ".join(f"{realigner.counts[kind]} {kind}" for kind in KINDS)
        text += f"; {realigner.tokens / max(now - self.begun, 1e-9):,.0f} tokens/s"
        self.bar.update(self.task, completed=lines, description=text)
        if not self.console.is_terminal and (now - self.said > SAY_S or lines == self.total):
            self.said = now
            print(f"line {lines} of {self.total}: {text}", flush=True)


def summary(outcomes: Path, splitter: str) -> tuple[str, int]:
    """(what became of all lines of outcomes.jsonl, how many were kept).  splitter: "" where none was looked for."""
    kinds, reasons, ends, first = Counter(), Counter(), Counter(), {}
    unsplit = 0
    for outcome in read_scores(outcomes):
        kinds[outcome["kind"]] += 1
        if outcome.get("end_reason"):
            ends[outcome["end_reason"]] += 1
        if "reason" in outcome:
            reason = outcome["reason"].partition(":")[0]
            reasons[reason] += 1
            first.setdefault(reason, outcome)
        unsplit += outcome["kind"] == "hinted" and outcome["record"]["split_at"] is None
    total = sum(kinds.values())
    lines = [f"{total} samples: " + ", ".join(f"{kinds[kind]} {kind} ({kinds[kind] / max(1, total):.0%})" for kind in KINDS)]
    for reason, count in reasons.most_common():
        lines.append(f"  rejected, {count} x {reason}; first, line {first[reason]['line']}: {first[reason]['reason'][:300]}")
    if ends:
        lines.append("hinted decoding ended by " + ", ".join(f"{name} {count}" for name, count in ends.most_common()))
    if splitter and unsplit:
        lines.append(f"{unsplit} of {kinds['hinted']} hinted answers never wrote {splitter!r}, after which the question alone speaks: set --splitter "
                     "to what begins a final answer in this data, such as '####'")  # fmt: skip
    return "\n".join(lines), kinds["own"] + kinds["hinted"]


def mean_cll(realigned: Path) -> str:
    """One line on realigned.jsonl, whose records have been scored: means over samples, nats."""
    found: dict[str, list[float]] = {}
    with open(realigned, encoding="utf-8") as file:
        for record in map(json.loads, file):
            found.setdefault(record["kind"], []).append(record["cll"])
    every = [cll for values in found.values() for cll in values]
    parts = [f"{sum(values) / len(values):+.3f} {kind}" for kind, values in sorted(found.items())]
    return f"mean cll of an answer under the model: {sum(every) / len(every):+.3f} nats ({', '.join(parts)}); 0 is what it writes by itself, on average"
