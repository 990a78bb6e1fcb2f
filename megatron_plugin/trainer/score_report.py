"""The page of `megatron-plugin score`: how on-distribution the data is, in words, numbers and two pictures, and the samples that are least so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_plugin.data import Conversation, ConversationEncoder, DataError, iter_lines
from megatron_plugin.data.scores import Summary
from megatron_plugin.losses.cll import CLL_BELOW
from megatron_plugin.report.page import cell, write_page

__all__ = ["write_report"]

READINGS = (  # mean cll of a token, nats, from which on: what that means
    (0.1, "likelier than the model's own samples, as where the data is surer than the model: low-temperature text, or a model that is flat still"),
    (-0.05, "on-distribution: as the model's own samples"),
    (-0.1, "nearly on-distribution"),
    (-0.5, "somewhat off-distribution"),
    (-1.0, "off-distribution"),
    (float("-inf"), "far off-distribution: the model would hardly say any of it"),
)
"""A reading aid: -0.05 and -0.1 are the README's of the paper's code (hinted decoding is near the first, self-distillation below the second);
the others are ours."""
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 60
CONTEXT = 8  # tokens shown before the most surprising one
NAMES = {"cll": "cll = log p + H", "logp": "log p", "entropy": "entropy H", "p": "p"}


def write_report(
    out: Path, found: Summary, *, data: Path, model: str, seq_length: int, encoder: ConversationEncoder, train_on: str
) -> str:
    """OUT/report.md, the same as OUT/report.html, and OUT/cll.png; returns the first paragraph, for the terminal."""
    verdict = _verdict(found)
    counts = (f"{found.samples} of {found.lines} lines scored, {found.tokens} answer tokens; {found.truncated} samples cut to {seq_length} tokens, "
              f"{sum(found.problems.values())} lines not scored")  # fmt: skip
    parts = [f"# {cell(data.name)} under {cell(model)}", verdict, counts + _problems(found), "![histogram](cll.png)", _numbers(found), _quantiles(found),
             _worst(found, data, seq_length, encoder, train_on), _explanation(found)]  # fmt: skip
    (out / "report.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    _draw(found, out / "cll.png", title=f"{data.name}: {found.samples} samples")
    write_page(out / "report.html", "\n\n".join(parts), title=f"{data.name} under {model}")
    return f"{verdict}\n{counts}"


def _verdict(found: Summary) -> str:
    if "cll" not in found.means:
        return f"Mean log p of an answer token: **{found.means['logp']:.3f}** nats.  Without entropies this does not say how on-distribution the data is."
    mean = found.means["cll"]
    reading = next(text for lowest, text in READINGS if mean >= lowest)
    deep = f"{found.means[f'cll_below_minus_{CLL_BELOW[-1]}']:.2%} of the tokens are below -{CLL_BELOW[-1]}"
    return f"Mean cll of an answer token: **{mean:+.3f}** nats, {reading}; {deep}."


def _problems(found: Summary) -> str:
    if not found.problems:
        return ""
    lines = [f"- {count} x {kind}; first: line {found.examples[kind]['line']}" for kind, count in found.problems.most_common()]
    return ":\n\n" + "\n".join(lines)


def _numbers(found: Summary) -> str:
    rows = ["| over all answer tokens | mean |", "|---|---|"]
    rows += [f"| {NAMES[name]} | {found.means[name]:.4f} |" for name in NAMES if name in found.means]
    if "cll" in found.means:
        rows.append(f"| share with cll > 0 | {found.means['cll_above_0']:.2%} |")
        rows += [f"| share with cll < -{nats} | {found.means[f'cll_below_minus_{nats}']:.2%} |" for nats in CLL_BELOW]
    return "\n".join(rows)


def _quantiles(found: Summary) -> str:
    rows = ["| mean of a sample | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |", "|---|" + "---|" * len(SHARES)]
    for name, values in found.columns.items():
        ordered = values.sort().values  # torch.quantile takes 16 million at most
        cells = [f"{float(ordered[round(share * (len(ordered) - 1))]):.3f}" for share in SHARES]
        rows.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _worst(found: Summary, data: Path, seq_length: int, encoder: ConversationEncoder, train_on: str) -> str:
    """The samples with the lowest mean, each with its most surprising token in context, read once more from the data."""
    wanted, texts = {score["line"]: score for score in found.worst}, {}
    for line, item in enumerate(iter_lines(data, train_on=train_on), 1):
        if line in wanted and isinstance(item, Conversation):
            texts[line] = _around(encoder, item, wanted[line]["lowest_at"])
        if len(texts) == len(wanted):
            break
    name = found.ranked_by
    rows = [f"| line | tokens | mean {name} | lowest | at |", "|---|---|---|---|---|"]
    rows += [f"| {s['line']} | {s['tokens']} | {s[name]:.3f} | {s['lowest']:.2f} | {texts.get(s['line'], '')} |" for s in found.worst]
    return f"## The {len(found.worst)} samples that are least like the model\n\n" + "\n".join(rows)


def _around(encoder: ConversationEncoder, conversation: Conversation, place: int) -> str:
    """The token at `place` in bold behind the few before it, as one line of a Markdown table."""
    try:
        ids = encoder.encode(conversation).tokens_T.tolist()
    except DataError:
        return ""
    before, token = (encoder.tokenizer.decode(part) for part in (ids[max(0, place - CONTEXT) : place], ids[place : place + 1]))
    return f"{cell(before)} **{cell(token.replace(' ', '␣')) or '(nothing)'}**"  # behind a space, or punctuation would not be bold


def _explanation(found: Summary) -> str:
    if "cll" not in found.means:
        return "log p: of each answer token at temperature 1, as the engine reports it.  It falls with the text's own entropy too: compare data sets only."
    return (
        "cll: log p of a token plus the entropy of the model's distribution there, nats.  Over the model's own samples at temperature 1 its mean is\n"
        "exactly 0.  For other data it is H(model) - H(data) - KL(data || model), so a mean near 0 alone proves nothing: text of low entropy\n"
        "(greedy, templates) can hide a distance.  Look at the shares far below 0 and at the samples above."
    )


def _draw(found: Summary, png: Path, *, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    name = found.ranked_by
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), constrained_layout=True)
    _histogram(axes[0], found.columns[name].tolist(), mean=found.means[name])
    axes[0].set_xlabel(f"mean {NAMES[name]} of a sample, nats")
    axes[0].set_ylabel("samples")
    if "entropy" in found.columns:
        _scatter(axes[1], found.columns["entropy"], -found.columns["logp"])
    else:
        axes[1].set_visible(False)
    figure.suptitle(title)
    figure.savefig(png, dpi=110)
    plt.close(figure)


def _histogram(axis: Any, values: Sequence[float], *, mean: float) -> None:
    axis.hist(values, bins=BINS, color="C0", alpha=0.8)
    axis.axvline(0.0, color="black", linewidth=1, label="the model's own samples")
    axis.axvline(mean, color="C3", linestyle="--", label=f"mean of a token, {mean:+.3f}")
    axis.legend(fontsize=8, framealpha=0.3)
    axis.grid(alpha=0.3)


def _scatter(axis: Any, entropy: torch.Tensor, nll: torch.Tensor) -> None:
    """At most 20 000 samples; on the diagonal cll is 0."""
    every = max(1, len(entropy) // 20_000)
    axis.scatter(entropy[::every].tolist(), nll[::every].tolist(), s=6, alpha=0.4, linewidths=0)
    top = float(torch.maximum(entropy.max(), nll.max()))
    axis.plot([0, top], [0, top], color="black", linewidth=1, label="cll = 0")
    axis.set_xlabel("mean entropy of a sample, nats")
    axis.set_ylabel("mean -log p of a sample, nats")
    axis.legend(fontsize=8, framealpha=0.3)
    axis.grid(alpha=0.3)
