"""What `megatron-plugin eval` says about drawn answers: mean@k, pass@k, their spread, and the page.

n: answers drawn per question; c: those of them that are right.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_plugin.report.page import cell, quoted

__all__ = ["Answers", "answers_page", "numbers_json", "pass_at_k", "summed_up"]

SHOWN = 5
LONGEST = 4000  # characters of an answer that are shown


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k answers is right, unbiased from n >= k of which c are: 1 - C(n - c, k) / C(n, k)  (arXiv 2107.03374, eq. 1).

    ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"got n={n}, c={c}, k={k}; expected 0 <= c <= n and 1 <= k <= n")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


@dataclass
class Answers:
    """Of all questions."""

    questions: int = 0
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> (mean, standard error over questions)."""
    causes: Counter = field(default_factory=Counter)
    refused: int = 0
    """Questions that the engine did not take: they count as answered wrong."""
    failed: list[Mapping[str, Any]] = field(default_factory=list)
    """Some questions that no answer got right."""


def summed_up(lines: Iterable[Mapping[str, Any]], *, n: int) -> Answers:
    """Of the lines of answers.jsonl; each question weighs the same.  n: sampled answers per question, 0: greedy ones alone."""
    found, columns = Answers(), {}
    for line in lines:
        found.questions += 1
        found.refused += "refused" in line
        sampled, greedy = line.get("sampled", []), line.get("greedy")
        values = {"greedy, right": float(bool(greedy and greedy["right"]))}
        if n:
            right = sum(answer["right"] for answer in sampled)
            values[f"mean@{n}"] = right / n
            values |= {f"pass@{k}": pass_at_k(n, right, k) for k in _powers(n)}
        every = [*sampled, *([greedy] if greedy else [])]
        if every:
            values["tokens of an answer"] = statistics.fmean(answer["tokens"] for answer in every)
            values["cut off"] = statistics.fmean(answer["finish"] == "length" for answer in every)
        found.causes.update(answer["cause"] for answer in every)
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
        if not any(answer["right"] for answer in every) and len(found.failed) < SHOWN:
            found.failed.append(line)
    found.numbers = {name: _mean(values) for name, values in columns.items()}
    return found


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({1 << i for i in range(n.bit_length())} | {n})


def _mean(values: Sequence[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread


def numbers_json(numbers: Mapping[str, Sequence[float | None]]) -> str:
    """numbers.json.  What is not finite is null: JSON has no NaN, which the standard error of a single question is."""
    plain = {name: [x if x is not None and math.isfinite(x) else None for x in values] for name, values in numbers.items()}
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


def answers_page(found: Answers) -> list[str]:
    """Paragraphs of Markdown."""
    rows = ["| | mean | standard error |", "|---|---|---|"]
    rows += [f"| {cell(name)} | {mean:.4f} | {spread:.4f} |" for name, (mean, spread) in found.numbers.items()]
    said = f"{found.questions} questions; " + ", ".join(f"{count} answers {cause}" for cause, count in found.causes.most_common())
    if found.refused:
        said += f"; {found.refused} questions were refused by the engine and count as answered wrong"
    parts = ["## Answers", said + ".", "\n".join(rows)]
    if found.failed:
        parts.append("## Questions without a right answer")
    for line in found.failed:
        answer = line.get("greedy") or next(iter(line.get("sampled", [])), None)
        text = answer["text"] if answer else f"refused: {line['refused']}"
        parts += [f"{cell(line['source'])}, reference:", quoted(line["reference"][-LONGEST:]), quoted(line["prompt"][-LONGEST:]), quoted(text[:LONGEST])]
    return parts
