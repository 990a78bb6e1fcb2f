"""The studies' figures: one axis after another, each with its unit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_figure", "minus", "plot_curves"]

Found = dict[str, list[dict[str, Any]]]
BANDS = "line: mean over the seeds; band: from the lowest seed to the highest"


def draw_figure(title: str, height: float, draw: Callable[[Any, Found], None], found: Found, png: Path) -> None:
    """`draw` fills the figure; height in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, height), constrained_layout=True)
    draw(figure, found)
    figure.suptitle(f"{title}\n{BANDS}", fontsize=11)
    figure.savefig(png, dpi=90)
    plt.close(figure)


def plot_curves(
    axis, found: Found, name: str, *, unit: str, title: str, arms: Sequence[str] = (), marks: float | None = None, place: str = "best"
) -> None:
    """A curve of each arm over the training steps.  unit: of the vertical axis.  marks: a step that the claims read, as a dotted line.  place: of the legend."""
    for colour, (arm, records) in enumerate(found.items()):
        curves = [record["curve"][name] for record in records if name in record["curve"]]
        if not curves or (arms and arm not in arms):
            continue
        steps = [step for step, _ in curves[0]]
        values = list(zip(*([value for _, value in curve] for curve in curves), strict=True))
        axis.plot(steps, [statistics.mean(at_step) for at_step in values], color=f"C{colour}", label=arm.replace("_", " "), marker="." if len(steps) < 40 else None)
        axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=f"C{colour}", alpha=0.15, lw=0)
    if marks is not None:
        axis.axvline(marks, color="k", lw=0.8, ls=":")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, framealpha=0.3, loc=place)


def minus(found: Found, control: str) -> Found:
    """Every arm whose curves have the control's steps, its curves less the control's of the same seed."""
    lessened: Found = {}
    for arm, records in found.items():
        pairs = list(zip(records, found[control], strict=True))
        if all([step for step, _ in a["curve"][name]] == [step for step, _ in b["curve"][name]] for a, b in pairs for name in a["curve"]):
            lessened[arm] = [{"curve": {name: [[step, x - y] for (step, x), (_, y) in zip(a["curve"][name], b["curve"][name], strict=True)]
                                        for name in a["curve"]}} for a, b in pairs]  # fmt: skip
        else:
            lessened[arm] = []
    return lessened
