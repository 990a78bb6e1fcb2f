"""Command line, collected rows and the result file that every benchmark shares."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import _machine, shapes
from megatron_plugin.bench.harness import Contender, NotMeasured, Work, compare
from megatron_plugin.bench.machine import keep_freed_memory


class Report:
    """`python -m benchmarks.<name> --device cpu|cuda`: the options, and the rows so far.  Saved after every shape: a killed run keeps them."""

    def __init__(self, name: str, claim: str) -> None:
        self.name, self.claim = name, claim.strip().splitlines()[0]
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=claim, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--quick", action="store_true", help="two shapes and one held-out one")
        parser.add_argument("--tiny", action="store_true", help="tiny shapes: tests the benchmark, measures nothing")
        parser.add_argument("--no-slow-start", action="store_true", help="leave out contenders that compile or tune for seconds")
        parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="after this long no shape and no contender is begun")
        parser.add_argument("--seconds", type=float, default=5.0, help="time spent timing each shape")
        parser.add_argument("--out", type=Path, help="result file (JSON)")
        self.options = parser.parse_args()
        self.device, self.rows, self.began = self.options.device, [], time.monotonic()
        self.deadline = self.began + self.options.budget
        torch.manual_seed(shapes.SEED)
        if self.device == "cpu":
            keep_freed_memory()
        self.header = _machine.describe(self.device) | {"benchmark": name, "claim": self.claim, "tiny": self.options.tiny}
        print(f"# {name}: {self.claim}", flush=True)

    def shapes(self, table: dict[str, list[shapes.Shape]]):
        """The shapes of this run, while the budget lasts; those left over get a row that says so."""
        for shape in shapes.select(table, self.device, quick=self.options.quick, tiny=self.options.tiny):
            if time.monotonic() > self.deadline:
                self.add([{"shape": str(shape), "held_out": shape.held_out, "contender": "all", "ms": None, "reason": "time budget spent"}])
                continue
            if "torch._dynamo" in sys.modules:  # compiled rivals: one static shape at a time
                torch._dynamo.reset()
            yield shape
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def compare(self, case, contenders: list[Contender], work: Work, **limits) -> list[dict]:
        limits = {"deadline": self.deadline} | limits | ({"seconds": 0.0, "least": 2} if self.options.tiny else {"seconds": self.options.seconds})
        if self.options.no_slow_start:
            contenders = [c._replace(build=_left_out) if c.slow_start else c for c in contenders]
        return self.add(compare(case, contenders, work, **limits))

    def add(self, rows: list[dict]) -> list[dict]:
        rows = [{"benchmark": self.name, **row} for row in rows]
        self.rows += rows
        for row in rows:
            print(line(row), flush=True)
        self.save()
        return rows

    def save(self) -> None:
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.header["load_after"] = round(os.getloadavg()[0], 2)
            self.header["seconds"] = round(time.monotonic() - self.began, 1)
            self.options.out.write_text(json.dumps({"runs": [self.header], "rows": self.rows}, indent=1) + "\n")


def _left_out(case):
    raise NotMeasured("left out by --no-slow-start")


def line(row: dict) -> str:
    """A row for the terminal."""
    head = f"{row['benchmark']:22s} {row['shape']:34s} {row['contender']:34s}"
    if row.get("reason"):
        return f"{head} not measured ({row['reason']})"
    time = "" if row["ms"] is None else f" {row['ms']:10.3f} ms [{row['p20']:.3f} {row['p80']:.3f}]"
    shares = "".join(f" {row[key]:.0%} of {key[6:]}" for key in ("share_copy", "share_read", "share_gemm") if key in row)
    peak = "" if row.get("peak_mib") is None else f" +{row['peak_mib']:.0f} MiB"
    worst = max(row.get("errors", {}).values(), default=None)
    return f"{head}{time}{shares}{peak}" + ("" if worst is None else f" error {worst:.0e}")
