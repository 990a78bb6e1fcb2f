"""Curves of one run or several, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_plugin.trainer.metrics import read_metrics

__all__ = ["plot_curves"]

PANELS = {  # title -> metrics drawn in it; plain NLL always stands beside a weighted loss
    "loss as trained": ("train/loss",), "NLL, nats per token": ("train/nll", "eval/heldout_nll"), "mean token probability": ("train/token_prob",),
    "entropy, nats": ("train/entropy",), "mean weight": ("train/weight_mean",), "gradient norm": ("train/grad_norm",),
}  # fmt: skip


def plot_curves(runs: Mapping[str, str | Path], png: str | Path, *, title: str = "") -> None:
    """One colour per run ({label: run directory}), one panel per quantity; held-out points are drawn with markers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for axis, (heading, names) in zip(axes.flat, PANELS.items(), strict=True):
        for i, (label, run_dir) in enumerate(runs.items()):
            lines = read_metrics(run_dir)
            for name in names:
                points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                if points:
                    held_out = name.startswith("eval/")
                    axis.plot(*zip(*points, strict=True), color=f"C{i}", marker="o" if held_out else None, linestyle="--" if held_out else "-",
                              alpha=1.0 if held_out else 0.8, label=f"{label}, held out" if held_out else label)  # fmt: skip
        axis.set_title(heading)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(png, dpi=110)
    plt.close(figure)
