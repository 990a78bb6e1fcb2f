"""Commands about runs that are there: report, plot."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_plugin.cli.arguments import UsageError

__all__ = ["add_plot", "add_report"]

PICTURES = (".png", ".svg", ".pdf")
"""What matplotlib can draw without a screen."""


def add_report(commands) -> None:
    text = ("Write RUN_DIR/report.html: curves, probabilities, evaluations, timing, best and worst samples, environment and configuration of a run in "
            "one file that needs nothing else.  Training writes it at its end; this makes it anew, also while the run goes on.")  # fmt: skip
    report = commands.add_parser("report", help="one page about a run", description=text)
    report.add_argument("run_dir", metavar="RUN_DIR")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    if not (Path(arguments.run_dir) / "metrics.jsonl").is_file():  # said here, because what draws the page imports torch
        raise UsageError(f"got {arguments.run_dir}, expected a run directory with a metrics.jsonl that has a step in it: `megatron-plugin train` makes one")
    from megatron_plugin.report.run_page import write_run_page

    print(write_run_page(arguments.run_dir))


def add_plot(commands) -> None:
    text = "Draw the curves of several runs over each other, a panel per quantity that any of them has measured."
    plot = commands.add_parser("plot", help="curves of several runs in one picture", description=text)
    plot.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="a run directory, or LABEL=RUN_DIR; default label: the directory's name")
    plot.add_argument("--out", metavar="PNG", default="curves.png", help="(%(default)s)")
    plot.set_defaults(run=_plot)


def _plot(arguments: argparse.Namespace) -> None:
    runs: dict[str, Path] = {}
    for text in arguments.run_dirs:
        label, named, path = text.partition("=")
        path = Path(path if named else text)
        label = label if named else path.name
        if not (path / "metrics.jsonl").is_file():
            raise UsageError(f"got {text}, expected a run directory with a metrics.jsonl, which `megatron-plugin train` makes")
        if label in runs:
            raise UsageError(f"got two runs called {label}, expected different names: LABEL={path}")
        runs[label] = path
    out = Path(arguments.out)
    if out.suffix.lower() not in PICTURES or not out.parent.is_dir():
        raise UsageError(f"--out: got {out}, expected a file that ends in {' or '.join(PICTURES)}, in a directory that exists")
    from megatron_plugin.report.plots import plot_curves

    plot_curves(runs, arguments.out)
    print(arguments.out)
