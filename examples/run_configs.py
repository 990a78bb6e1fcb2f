"""Run a list of configurations one after another, go on after a failure, and overlay the curves.

    python examples/run_configs.py runs.txt runs/ablation [--ranks 2] [--limit 3600] [-- train.steps=100 seed=1]

A line of runs.txt is a run: a label, a configuration, and what is different in it; "#" begins a comment.

    sft        configs/sft.yaml
    dft        configs/dft.yaml
    dft-fast   configs/dft.yaml        train.lr=1.0e-3

What stands behind "--" is for every run, in front of the line's own.  Each is `megatron-plugin train CONFIG run_dir=<folder>/<label> ...`, so a list
that is started again goes on where it stood and does not repeat what is finished.  The folder gets <label>.log, summary.json and compare.png; the exit code
is 1 if a run failed, 2 if the list cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_plugin.report.lines import read_metrics
from megatron_plugin.report.plots import plot_curves


@dataclass(frozen=True)
class Run:
    label: str
    config: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    label: str
    code: int | None
    """Exit code of the command; None: stopped at the time limit."""
    steps: int
    """Of metrics.jsonl, the last."""
    seconds: float

    def __str__(self) -> str:
        state = "done" if self.code == 0 else "stopped at its time limit" if self.code is None else f"FAILED, exit {self.code}"
        return f"{self.label}: {state}, {self.steps} steps, {self.seconds:.0f} s"


def read_list(path: Path) -> list[Run]:
    """The runs of a list.  ValueError with file and line for what is none, and for a label that comes twice."""
    runs: dict[str, Run] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words, where = shlex.split(line, comments=True), f"{path}:{number}"
        if not words:
            continue
        if len(words) < 2 or not all("=" in word for word in words[2:]):
            raise ValueError(f"{where}: got {line.strip()!r}, expected LABEL CONFIG [key=value ...]")
        label, config, *overrides = words
        if not re.fullmatch(r"[\w.+-]+", label) or label.strip(".") == "":
            raise ValueError(f"{where}: got the label {label!r}, expected letters, digits and . + - _: it names a folder")
        if label in runs:
            raise ValueError(f"{where}: got the label {label!r} again, expected a label of its own for each run")
        if any(word.startswith("run_dir=") for word in overrides):
            raise ValueError(f"{where}: got run_dir=, expected none: each run has the folder of its label")
        runs[label] = Run(label, config, tuple(overrides))
    if not runs:
        raise ValueError(f"{path}: got no run, expected lines of LABEL CONFIG [key=value ...]")
    return list(runs.values())


def command(run: Run, folder: Path, common: Sequence[str], ranks: int) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    return [sys.executable, "-m", *launcher, "megatron_plugin.cli", "train", run.config, f"run_dir={folder / run.label}", *common, *run.overrides]


def carry_out(run: Run, words: list[str], folder: Path, limit_s: float) -> Outcome:
    """Run it with its output in <label>.log; a failure is an outcome, no exception."""
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (folder / f"{run.label}.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            code = None
        except BaseException:  # Ctrl-C ends the list, and the run with it
            _end(process)
            raise
    lines = read_metrics(folder / run.label)
    return Outcome(run.label, code, int(lines[-1]["step"]) if lines else 0, time.monotonic() - began)


def _end(process: subprocess.Popen) -> None:
    """SIGTERM, upon which training saves its last step; SIGKILL after a minute."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_lines(log: Path, count: int = 3) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-count:])


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    common = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1, help="of torchrun, on this machine")
    parser.add_argument("--limit", type=float, default=24 * 3600.0, metavar="SECONDS", help="for one run")
    options = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    try:
        runs = read_list(options.list)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    folder, outcomes = options.folder.absolute(), []
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        outcome = carry_out(run, command(run, folder, common, options.ranks), folder, options.limit)
        outcomes.append(outcome)
        print(outcome, flush=True)
        if outcome.code != 0:
            print(f"{last_lines(folder / f'{run.label}.log')}\n    all of it: {folder / run.label}.log", flush=True)
        (folder / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    drawn = {o.label if o.code == 0 else f"{o.label} ({o.steps} steps)": folder / o.label for o in outcomes if o.steps}
    if drawn:
        plot_curves(drawn, folder / "compare.png", title=options.list.stem)
        print(f"curves of {len(drawn)} of {len(outcomes)} runs: {folder / 'compare.png'}")
    return int(any(outcome.code != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
