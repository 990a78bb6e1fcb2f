"""report.html of a run: how it went, in one page.  Made from the files of its directory, so it can be made again, also while it runs."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_plugin.report.environment import read_environment
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.report.page import cell, quoted, write_page
from megatron_plugin.report.plots import plot_curves, plot_probabilities
from megatron_plugin.rollout.log import read_rollouts

__all__ = ["NoRunError", "write_run_page"]

SHOWN_SAMPLES = 5
LONGEST = 4000  # characters of a sample that are shown
RECENT = 0.2  # samples are taken from the last fifth of the steps: what the model writes now
PARTS = {  # of a step
    "perf/generate_s": "sampling (waiting for engines)", "perf/judge_s": "judging", "perf/score_s": "log-probabilities of old policy and reference",
    "perf/data_s": "packing and making batches", "perf/forward_backward_s": "forward and backward", "perf/optimizer_s": "gradient norm and optimizer",
    "perf/sync_s": "sending weights",
}  # fmt: skip
OF_TRAINING = "perf/train_s"  # on-policy runs: data, forward, backward and optimizer together; older runs have nothing finer
BETWEEN = {"perf/save_s": "checkpoints", "perf/evaluate_s": "evaluations"}  # steps
ROWS = {  # heading -> metric, in the table of how it went
    "loss as trained": "train/loss", "NLL, nats": "train/nll", "token probability": "train/token_prob", "entropy, nats": "train/entropy",
    "mean weight": "train/weight_mean", "effective share of tokens": "train/weight_ess", "log p + H, nats": "train/cll_mean", "mu": "train/mu",
    "reward of rollouts": "rollout/reward_mean", "tokens of a completion": "rollout/len_mean", "gradient norm": "train/grad_norm",
    "tokens per second": "perf/tokens_per_s", "share of the devices' peak (MFU)": "perf/mfu", "memory of the fullest rank, GiB": "perf/memory_gib",
}  # fmt: skip


class NoRunError(ValueError):
    """The directory holds no run that has taken a step."""

    exit_code = 2


def write_run_page(run_dir: str | Path) -> Path:
    """RUN_DIR/report.html, curves.png and, where it was measured, probabilities.png.  NoRunError where nothing was logged."""
    run_dir = Path(run_dir)
    lines = read_metrics(run_dir)
    if not lines:
        raise NoRunError(f"got {run_dir}, expected a run directory with a metrics.jsonl that has a step in it: `megatron-plugin train` makes one")
    plot_curves({run_dir.name: run_dir}, run_dir / "curves.png")
    parts = [f"# {cell(str(run_dir))}", _headline(lines), "![curves](curves.png)", "## How it went", _course(lines)]
    if plot_probabilities(run_dir, run_dir / "probabilities.png"):
        parts += ["## Probability of the trained tokens", "Share of the tokens by the probability the model gives them.", "![probabilities](probabilities.png)"]
    parts += _evaluations(lines) + _timing(lines) + _samples(run_dir, lines[-1]["step"]) + _record(run_dir)
    return write_page(run_dir / "report.html", "\n\n".join(parts), title=run_dir.name)


def _headline(lines: Sequence[Mapping[str, Any]]) -> str:
    steps = [line for line in lines if "perf/step_s" in line]
    seconds = sum(line["perf/step_s"] for line in steps)
    bad = lines[-1].get("data/bad_lines") or 0
    return (f"{lines[-1]['step']} steps, {seconds:,.0f} s in them, median {statistics.median(line['perf/step_s'] for line in steps):.3g} s a step"
            + (f"; {bad:.0f} lines of the data were left out" if bad else "") + ".") if steps else "No step yet, only an evaluation."  # fmt: skip


def _course(lines: Sequence[Mapping[str, Any]]) -> str:
    """Means over the first and the last tenth of the steps, so that one odd batch does not tell the story."""
    rows = ["| | first tenth | last tenth |", "|---|---|---|"]
    for heading, name in ROWS.items():
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            tenth = max(1, len(values) // 10)
            rows.append(f"| {heading} | {statistics.fmean(values[:tenth]):.4g} | {statistics.fmean(values[-tenth:]):.4g} |")
    return "\n".join(rows)


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    names = sorted({name for line in lines for name, value in line.items() if name.startswith("eval/") and value is not None})
    if not names:
        return []
    rows = ["| held out | first | best | last |", "|---|---|---|---|"]
    for name in names:
        values = [(line[name], line["step"]) for line in lines if line.get(name) is not None]
        best = (min if name.endswith("_nll") else max)(values, key=lambda found: found[0])
        rows.append(f"| {cell(name.removeprefix('eval/'))} | " + " | ".join(f"{value:.4f} (step {step})" for value, step in (values[0], best, values[-1])) + " |")
    return ["## Evaluations", "\n".join(rows)]


def _timing(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the seconds of a step go; what no part accounts for is shown too, and what lies between steps below."""
    inside, between = _seconds(lines, PARTS), _seconds(lines, BETWEEN)
    if "forward and backward" not in inside:
        inside |= _seconds(lines, {OF_TRAINING: "forward, backward, optimizer"})
    whole = sum(line.get("perf/step_s") or 0.0 for line in lines)
    if not inside or not whole:
        return []
    inside["the rest"] = max(0.0, whole - sum(inside.values()))
    rows = ["| part of a step | seconds in all | share of the steps |", "|---|---|---|"]
    rows += [f"| {heading} | {seconds:,.1f} | {seconds / whole:.0%} |" for heading, seconds in inside.items()]
    rows += [f"| between steps: {heading} | {seconds:,.1f} | {seconds / whole:.0%} |" for heading, seconds in between.items()]
    return ["## Where the time went", "\n".join(rows)]


def _seconds(lines: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, float]:
    """{heading: seconds in all}, of {metric: heading}, where there are any."""
    summed = {heading: sum(line.get(name) or 0.0 for line in lines) for name, heading in names.items()}
    return {heading: seconds for heading, seconds in summed.items() if seconds}


def _samples(run_dir: Path, last_step: int) -> list[str]:
    """Best and worst of the last fifth of the steps, read once and kept as two short lists."""
    recent = (line for path in sorted(run_dir.glob("rollouts*.jsonl")) for line in read_rollouts(path) if line["step"] > last_step * (1 - RECENT))
    best, worst = _extremes(recent)
    if not best:
        return []
    parts = []
    for heading, samples in (("Best samples", best), ("Worst samples", worst)):
        parts.append(f"## {heading} of the last steps")
        for line in samples:
            text = line["completion"][:LONGEST] + (" [...]" if len(line["completion"]) > LONGEST else "")
            parts += [f"**reward {line['reward']:g}**, {cell(line['cause'] or 'judged')}, step {line['step']}, {cell(line['source'])}, {line['tokens']} tokens",
                      quoted(line["prompt"][-LONGEST:]), quoted(text)]  # fmt: skip
    return parts


def _extremes(lines: Iterable[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
    """The samples of highest and of lowest reward, of each prompt at most one; of equal ones the shortest, so that the page stays readable."""
    best: dict[str, dict] = {}
    worst: dict[str, dict] = {}
    for line in lines:
        source = line["source"]
        if line.get("reward") is None:
            continue
        if source not in best or _rank(line) < _rank(best[source]):
            best[source] = line
        if source not in worst or _rank(line, -1) < _rank(worst[source], -1):
            worst[source] = line
    return (heapq.nsmallest(SHOWN_SAMPLES, best.values(), key=_rank), heapq.nsmallest(SHOWN_SAMPLES, worst.values(), key=lambda line: _rank(line, -1)))


def _rank(line: Mapping[str, Any], sign: int = 1) -> tuple[float, int]:
    return -sign * line["reward"], line["tokens"]


def _record(run_dir: Path) -> list[str]:
    parts = []
    if environment := read_environment(run_dir):
        parts += ["## Environment", "| | |\n|---|---|\n" + "\n".join(f"| {cell(name)} | {cell(str(value))} |" for name, value in environment.items())]
    if (config := run_dir / "config.yaml").is_file():
        parts += ["## Configuration", quoted(config.read_text().strip())]
    return parts
