"""Curves of one run or several, as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_plugin.losses.probability import PROBABILITY_METRICS
from megatron_plugin.report.lines import read_metrics

__all__ = ["plot_curves", "plot_probabilities"]

PANELS = {  # title -> metrics drawn in it; plain NLL always stands beside a weighted loss
    "held-out reward": ("eval/heldout_reward_sampled", "eval/heldout_reward_greedy"), "harder held-out reward": ("eval/ood_reward_sampled", "eval/ood_reward_greedy"),
    "reward of rollouts": ("rollout/reward_mean",), "mu": ("train/mu",), "phi of expert tokens": ("train/phi_mean",),
    "entropy of rollouts, nats": ("train/rollout_entropy",), "entropy on expert tokens, nats": ("train/expert_entropy",), "NLL of expert tokens, nats": ("train/expert_nll",),
    "tokens of a completion": ("rollout/len_mean",), "largest |log p - engine's|, nats": ("rollout/logp_diff_max",),
    "loss as trained": ("train/loss",), "NLL on training data, nats": ("train/nll",), "NLL held out, nats": ("eval/heldout_nll", "eval/ood_nll"),
    "mean token probability": ("train/token_prob",), "entropy, nats": ("train/entropy",), "mean weight": ("train/weight_mean",),
    "mean log p + H (cll), nats": ("train/cll_mean",), "share of tokens with cll < -3": ("train/cll_below_minus_3",), "ramp of idft": ("train/ramp",),
    "gradient norm": ("train/grad_norm",), "learning rate": ("train/lr",), "tokens per second": ("perf/tokens_per_s",),
    "share of the devices' peak (MFU)": ("perf/mfu",), "memory of the fullest rank, GiB": ("perf/memory_gib",),
}  # fmt: skip
STYLES = {  # marker, line, label's end
    "eval/heldout_nll": ("o", "-", ", held out"), "eval/ood_nll": ("x", ":", ", harder"), "eval/heldout_reward_sampled": ("o", "-", ", sampled"),
    "eval/heldout_reward_greedy": ("x", ":", ", greedy"), "eval/ood_reward_sampled": ("o", "-", ", sampled"), "eval/ood_reward_greedy": ("x", ":", ", greedy"),
}  # fmt: skip
COLUMNS = 4
SLICES = 60  # of a run, in the histogram over time: a slice is a mean over its steps


def plot_curves(runs: Mapping[str, str | Path], png: str | Path, *, title: str = "") -> None:
    """One colour per run ({label: run directory}), one panel per quantity that any of them has measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {label: read_metrics(run_dir) for label, run_dir in runs.items()}
    measured = {name for lines in curves.values() for line in lines for name, value in line.items() if value is not None}
    panels = {heading: names for heading, names in PANELS.items() if measured & set(names)} or {"nothing was measured": ()}
    rows = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(17, 3.5 * rows), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (heading, names) in zip(axes.flat, panels.items(), strict=False):
        _draw(axis, curves, names)
        axis.set_title(heading)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(fontsize=7, framealpha=0.3)
    figure.suptitle(title)
    figure.savefig(png, dpi=110)
    plt.close(figure)


def _draw(axis, curves: Mapping[str, Sequence[Mapping[str, float]]], names: Sequence[str]) -> None:
    for colour, (label, lines) in enumerate(curves.items()):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                marker, line, suffix = STYLES.get(name, (None, "-", ""))
                axis.plot(*zip(*points, strict=True), color=f"C{colour}", marker=marker, linestyle=line, label=label + suffix)


def plot_probabilities(run_dir: str | Path, png: str | Path) -> bool:
    """The histogram of token probabilities over the steps of one run, and that of its first and last slice.  False where none was measured."""
    lines = [line for line in read_metrics(run_dir) if all(line.get(f"train/{name}") is not None for name in PROBABILITY_METRICS)]
    if not lines:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    below = [[0.0, *(line[f"train/{name}"] for name in PROBABILITY_METRICS), 1.0] for line in lines]
    shares = [[upper - lower for lower, upper in zip(edges, edges[1:], strict=False)] for edges in below]
    slices = min(SLICES, len(shares))
    bounds = [round(i * len(shares) / slices) for i in range(slices + 1)]
    means = [[sum(bins) / (end - start) for bins in zip(*shares[start:end], strict=True)] for start, end in zip(bounds, bounds[1:], strict=False)]
    figure, (over_time, ends) = plt.subplots(1, 2, figsize=(12, 3.6), constrained_layout=True)
    image = over_time.imshow(list(zip(*means, strict=True)), origin="lower", aspect="auto", extent=(lines[0]["step"], lines[-1]["step"] + 1, 0, 1), vmin=0)
    figure.colorbar(image, ax=over_time, label="share of the trained tokens")
    over_time.set_xlabel("step")
    over_time.set_ylabel("probability of the token")
    centres = [(i + 0.5) / len(means[0]) for i in range(len(means[0]))]
    for label, values, shift in (("first", means[0], -0.02), ("last", means[-1], 0.02)):
        ends.bar([centre + shift for centre in centres], values, width=0.04, label=f"{label} slice of the run")
    ends.set_xlabel("probability of the token")
    ends.legend(framealpha=0.3)
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return True
