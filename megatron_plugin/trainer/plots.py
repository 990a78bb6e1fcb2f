"""Curves of one run or several, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_plugin.trainer.metrics import read_metrics

__all__ = ["plot_curves"]

PANELS = {  # title -> metrics drawn in it; plain NLL always stands beside a weighted loss
    "loss as trained": ("train/loss",), "NLL on training data, nats": ("train/nll",), "NLL held out, nats": ("eval/heldout_nll", "eval/ood_nll"),
    "mean token probability": ("train/token_prob",), "entropy, nats": ("train/entropy",), "mean weight": ("train/weight_mean",),
    "gradient norm": ("train/grad_norm",), "learning rate": ("train/lr",),
}  # fmt: skip
STYLES = {"eval/heldout_nll": ("o", "-", ", held out"), "eval/ood_nll": ("x", ":", ", harder")}  # marker, line, label's end


def plot_curves(runs: Mapping[str, str | Path], png: str | Path, *, title: str = "") -> None:
    """One colour per run ({label: run directory}), one panel per quantity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(17, 7), constrained_layout=True)
    curves = {label: read_metrics(run_dir) for label, run_dir in runs.items()}
    for axis, (heading, names) in zip(axes.flat, PANELS.items(), strict=True):
        for colour, (label, lines) in enumerate(curves.items()):
            for name in names:
                points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                if points:
                    marker, line, suffix = STYLES.get(name, (None, "-", ""))
                    axis.plot(*zip(*points, strict=True), color=f"C{colour}", marker=marker, linestyle=line, label=label + suffix)
        axis.set_title(heading)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7, framealpha=0.3)
    figure.suptitle(title)
    figure.savefig(png, dpi=110)
    plt.close(figure)
