"""How on-distribution each sample of a data set is: one line of scores.jsonl per line of the data, and their sum.

    {"line": 7, "tokens": 85, "logp": -1.1, "p": 0.51, "cll": -0.31, "entropy": 0.79, "cll_above_0": 0.64, ..., "lowest": -7.2, "lowest_at": 131}
    {"line": 8, "problem": "no assistant turn ..."}

Line n of scores.jsonl is line n of the data, also where it could not be scored: so a file that was cut off says where to go on.  Means are over
the trained tokens of the sample; nats.  Scores of an engine that gives no entropy have no cll.   T: tokens of one sample.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_plugin.data.errors import DataError
from megatron_plugin.data.tokenize import IGNORE_INDEX, Sample
from megatron_plugin.losses.cll import CLL_METRICS, cll_counts

__all__ = ["ScoreFile", "Summary", "read_scores", "sample_score", "summarise"]

Score = dict[str, Any]
DECIMALS = 6


def sample_score(sample: Sample, logp_T: Tensor, entropy_T: Tensor | None) -> Score:
    """Statistics of one sample's trained tokens, the first token of a row apart, which nothing predicts.

    logp_T, entropy_T: nats, at the tokens' own places (trainer/mixed.py: Scored).  lowest: the smallest cll (log p without entropies), and
    lowest_at its place among the sample's tokens.  DataError where no token is trained."""
    live = sample.labels_T != IGNORE_INDEX
    live[0] = False
    if not live.any():
        raise DataError("no token of an answer to score", sample.source)
    places, logp = live.nonzero()[:, 0], logp_T[live].double()
    score = {"tokens": len(logp), "logp": logp.mean(), "p": logp.exp().mean()}
    ranked = logp
    if entropy_T is not None:
        entropy = entropy_T[live].double()
        ranked = logp + entropy
        score |= {"cll": ranked.mean(), "entropy": entropy.mean()}
        score |= {name: count / len(logp) for name, count in cll_counts(logp, entropy).items()}
    lowest = int(ranked.argmin())
    score |= {"lowest": ranked[lowest], "lowest_at": places[lowest]}
    return {name: _plain(value) for name, value in score.items()}


def _plain(value: Any) -> float | int:
    value = value.item() if isinstance(value, Tensor) else value
    return round(value, DECIMALS) if isinstance(value, float) else value


class ScoreFile:
    """scores.jsonl as it grows: complete lines only, each data line once."""

    def __init__(self, path: str | Path):
        """Opened, or taken up again behind its last complete line: what follows (a line that a kill cut off) is removed."""
        self.path, self.lines = Path(path), 0
        end = 0
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or its process is gone
        except OSError as error:
            self._file.close()
            raise DataError("got a file that another process is writing, expected none: is the same command running already?", str(self.path)) from error
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n") or not _is_line(line, self.lines + 1):
                break
            self.lines, end = self.lines + 1, end + len(line)
        self._file.truncate(end)

    def append(self, scores: Iterable[Score]) -> None:
        """The next lines of the data, in order; on the disk when this returns."""
        for score in scores:
            if score["line"] != self.lines + 1:
                raise ValueError(f"{self.path}: got the score of line {score['line']}, expected that of line {self.lines + 1}")
            self._file.write(json.dumps(score, ensure_ascii=False).encode() + b"\n")
            self.lines += 1
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _is_line(text: bytes, number: int) -> bool:
    try:
        return json.loads(text)["line"] == number
    except (ValueError, KeyError, TypeError):
        return False


def read_scores(path: str | Path) -> Iterator[Score]:
    """Line by line."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


@dataclass
class Summary:
    """A data set; memory: a few numbers per sample."""

    lines: int = 0
    samples: int = 0
    tokens: int = 0
    truncated: int = 0
    problems: Counter = field(default_factory=Counter)
    """How many lines could not be scored, by reason without its numbers."""
    examples: dict[str, Score] = field(default_factory=dict)
    """The first line of each reason."""
    means: dict[str, float] = field(default_factory=dict)
    """Over all tokens: logp, p, and where there are entropies cll, entropy and the shares CLL_METRICS."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """[samples] fp32 each, per sample: logp, and where there are entropies cll and entropy."""
    worst: Sequence[Score] = ()
    """The samples with the lowest mean cll (log p without entropies), lowest first."""

    @property
    def ranked_by(self) -> str:
        return "cll" if "cll" in self.means else "logp"


def summarise(scores: Iterable[Score], *, worst: int) -> Summary:
    """One pass over the lines."""
    found, columns = Summary(), {name: array("f") for name in ("cll", "logp", "entropy")}
    sums: defaultdict[str, float] = defaultdict(float)
    lowest: list[tuple[float, int, Score]] = []
    for score in scores:
        found.lines += 1
        if "problem" in score:
            kind = score["problem"].partition(" (")[0].partition(":")[0]
            found.problems[kind] += 1
            found.examples.setdefault(kind, score)
            continue
        found.samples += 1
        found.tokens += score["tokens"]
        found.truncated += bool(score.get("truncated"))
        for name in ("logp", "p", "cll", "entropy", *CLL_METRICS):
            if name in score:
                sums[name] += score[name] * score["tokens"]
        for name, values in columns.items():
            if name in score:
                values.append(score[name])
        heapq.heappush(lowest, (-(score["cll"] if "cll" in score else score["logp"]), -score["line"], score))
        if len(lowest) > worst:
            heapq.heappop(lowest)
    found.means = {name: total / found.tokens for name, total in sums.items()}
    found.columns = {name: torch.tensor(values) for name, values in columns.items() if values}
    found.worst = [score for *_, score in sorted(lowest, key=lambda item: (-item[0], -item[1]))]
    return found
