"""What the studies share: arms over seeds, each kept once it is done; claims with a rule; a result file and a figure.

A claim is one number for each seed that is above 0 where the paper's statement holds.  It
    shows           where its mean exceeds three standard errors,
    opposite        where it is below minus three standard errors,
    does not show   otherwise;
the docstring of each study says which number that is, and where it was changed after a look at results.  No number is above 0 by construction: where a
curve has noise, it is read at a step of the schedule, not where it is lowest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import _machine
from benchmarks.dynamics.base import RUNS
from benchmarks.dynamics.draw import draw_figure
from benchmarks.dynamics.provenance import code_of_run, made_now

__all__ = ["Claim", "Found", "Record", "Study", "formatted", "main", "mean_and_error", "run_arm", "verdict"]

RESULTS = _machine.ROOT / "benchmarks" / "results"
Record = dict[str, Any]
""""end": {quantity: number}; "curve": {quantity: [[step, number], ...]}; whatever else the figure needs."""
Found = dict[str, list[Record]]
"""Arm -> its records, in the order of the seeds."""


@dataclass(frozen=True)
class Claim:
    statement: str
    rule: str
    """The number, in words."""
    values: list[float]
    """One for each seed."""


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    settings: Any
    """A frozen dataclass of numbers: arms are run again when it changes."""
    tiny: Any
    """The same type: tests the code, shows nothing."""
    arms: Sequence[str]
    run: Callable[[str, int, Any, Path], Record]
    """(arm, seed, settings, runs)"""
    claims: Callable[[Found], list[Claim]]
    columns: Mapping[str, str]
    """Quantity of record["end"], or of `derived`, -> heading of the table."""
    figure: Callable[[Any, Found], None]
    """(matplotlib figure, found)"""
    height: float = 3.8
    """Of the figure, inches."""
    control: str = ""
    """Which arm is the control, and of what."""
    notes: Sequence[str] = field(default_factory=tuple)
    seeds: Sequence[int] = (0, 1, 2)
    """Unless the command line says otherwise."""
    shared: Mapping[str, Study] = field(default_factory=dict)
    """Arm -> the study whose arm it is: run once, kept there."""
    derived: Callable[[Record], dict[str, float]] = lambda record: {}
    """More quantities of a record, out of its curves."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over seeds; NaN for the error of one, and for both where a value is missing (NaN)."""
    if any(map(math.isnan, values)):
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def verdict(values: Sequence[float]) -> str:
    """By the rule above; "too few seeds" below three, "not measured" where one of them gave nothing."""
    if len(values) < 3:
        return "too few seeds"
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return "not measured"
    return "shows" if mean > 3 * error else "opposite" if mean < -3 * error else "does not show"


def run_arm(study: Study, arm: str, seed: int, settings: Any, runs: Path, *, as_kept: bool = False) -> Record:
    """The record of one arm and seed, from `runs` where it has been run with these settings and this code; as_kept: whatever code it was."""
    if other := study.shared.get(arm):
        return run_arm(other, arm, seed, other.tiny if settings == study.tiny else other.settings, runs, as_kept=as_kept)
    path = runs / study.name / f"seed{seed}-{arm}.json"
    asked = json.loads(json.dumps(asdict(settings)))
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == asked and (as_kept or kept["made"]["code"] == code_of_run(study.run)):
            return kept
    torch.manual_seed(seed)
    began = time.process_time()
    record = study.run(arm, seed, settings, runs) | {"settings": asked, "made": made_now(study.run)}
    record["seconds"] = round(time.process_time() - began, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record))
    os.replace(temporary, path)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in record["end"].items())
    print(f"{study.name} seed {seed} {arm:16s} {record['seconds']:6.1f} s  {shown}", flush=True)
    return record


def summary(study: Study, found: Found, seeds: Sequence[int]) -> dict[str, Any]:
    """Table, claims, who made each arm, and the curves, as JSON."""
    ends = {arm: [record["end"] | study.derived(record) for record in records] for arm, records in found.items() if records}
    claims = [
        {"statement": claim.statement, "rule": claim.rule, "values": [None if math.isnan(value) else round(value, 6) for value in claim.values], "verdict": verdict(claim.values)}
        for claim in study.claims(found)
    ]
    return {"study": study.name, "title": study.title, "seeds": list(seeds), "control": study.control, "notes": list(study.notes),
            "columns": dict(study.columns), "table": {arm: {name: [end.get(name) for end in rows] for name in study.columns} for arm, rows in ends.items()},
            "claims": claims, "code": code_of_run(study.run), "codes": {arm: code_of_run(other.run) for arm, other in study.shared.items()}, "seconds": sum(record["seconds"] for records in found.values() for record in records),
            "made": {arm: [record["made"] for record in records] for arm, records in found.items()},
            "curves": {arm: [record["curve"] for record in records] for arm, records in found.items()}}  # fmt: skip


def as_text(document: dict[str, Any]) -> str:
    """Indented JSON, but for what is long and read by programs only: a line for each arm."""
    lines = {name: document[name] for name in ("made", "curves")}
    rest = json.dumps({name: value for name, value in document.items() if name not in lines}, indent=1)
    for name, arms in lines.items():
        rows = ",\n".join(f"  {json.dumps(arm)}: {json.dumps(value)}" for arm, value in rounded(arms).items())
        rest = rest.removesuffix("\n}") + f',\n "{name}": {{\n{rows}\n }}\n}}'
    return rest + "\n"


def rounded(value: Any) -> Any:
    """Floats to six digits behind the point: a curve's noise begins long before."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def show(result: dict[str, Any]) -> None:
    for arm, row in result["table"].items():
        cells = [f"{heading} {formatted(row[name])}" for name, heading in result["columns"].items() if None not in row[name]]
        print(f"  {arm:18s} " + "  ".join(cells))
    for claim in result["claims"]:
        print(f"  {claim['verdict'].upper():14s} {claim['statement']}: {formatted([math.nan if value is None else value for value in claim['values']])}")


def formatted(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def main(study: Study, words: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=study.title)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(study.seeds))
    parser.add_argument("--arms", nargs="+", choices=study.arms, default=list(study.arms), help="run these only, and write no result")
    parser.add_argument("--tiny", action="store_true", help="tests the code, shows nothing")
    parser.add_argument("--as-kept", action="store_true", help="take finished arms of these settings whatever code made them; the page says so")
    parser.add_argument("--runs", type=Path, default=RUNS, help="finished arms are kept there")
    parser.add_argument("--into", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    began, header = time.monotonic(), _machine.describe("cpu")
    settings = study.tiny if options.tiny else study.settings
    found = {arm: [] for arm in options.arms}
    for seed in options.seeds:
        for arm in options.arms:
            found[arm].append(run_arm(study, arm, seed, settings, options.runs, as_kept=options.as_kept))
    if set(options.arms) != set(study.arms):
        return {}
    result = summary(study, found, options.seeds)
    result["settings"] = asdict(settings)
    header["command"] = f"python -m benchmarks.dynamics.{study.name}"
    header["wall_seconds"], header["tiny"] = round(time.monotonic() - began, 1), options.tiny
    options.into.mkdir(parents=True, exist_ok=True)
    stem = options.into / f"{header['date'][:10]}-cpu-dynamics-{study.name.replace('_', '-')}"
    stem.with_suffix(".json").write_text(as_text({"header": header, **result}))
    draw_figure(study.title, study.height, study.figure, found, stem.with_suffix(".png"))
    show(result)
    return result
