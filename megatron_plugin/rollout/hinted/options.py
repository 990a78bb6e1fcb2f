"""How a hinted answer is drawn: the mixing, the sampling and the stops, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["SCHEDULES", "HintedOptions"]

SCHEDULES = ("linear", "sigmoid", "piecewise")
ENGINE_FIELDS = (
    "vocab_size", "end_ids", "beta", "schedule", "center", "bounds", "top_p", "splitter", "first_from_hint", "repeat_ngram", "repeat_count",
    "repeat_every",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HintedOptions:
    """Of Hinted Decoding (arXiv 2602.12222).  p: the hinted stream, which has seen the answer; q: the plain one, which has the question only.

    Defaults are those of the authors' function; their README runs beta=3."""

    vocab_size: int
    """V: the tokenizer's real vocabulary (data.true_vocab_size), which log V is of.  Columns beyond it are padding and never drawn.  (The authors
    take config.vocab_size, padding and all.)"""
    end_ids: tuple[int, ...]
    """Tokens that end an answer of the plain stream.  Drawn from the mix, they end both."""
    beta: float = 0.7
    """linear and sigmoid: how soon the plain stream speaks.  0 with linear: the hinted stream alone."""
    schedule: str = "linear"
    """lambda of h = H(p) / log V.  linear: clamp(beta h, 0, 1); sigmoid: 1 / (1 + exp(-beta (h - center))); piecewise: from 0 at bounds[0] to
    1 at bounds[1]."""
    center: float = 0.5
    bounds: tuple[float, float] = (0.3, 0.7)
    top_p: float = 0.95
    """Of the mix before the temperature: the fewest tokens that have this probability together."""
    temperature: float = 0.3
    """After the nucleus.  0: greedy; vLLM knows none between 0 and 0.01."""
    splitter: str = "\\boxed{"
    """Once the answer's text contains it, the plain stream alone is drawn from, so that a wrong way does not get the right answer.  "": never."""
    first_from_hint: bool = True
    """The first token is drawn from the hinted stream alone."""
    max_tokens: int = 8192
    repeat_ngram: int = 30
    """An answer in which any so many tokens come repeat_count times is ended, checked every repeat_every tokens."""
    repeat_count: int = 5
    repeat_every: int = 100
    """0: never."""
    seed: int = 0
    """With a prompt's key it decides the answer, up to rounding, whatever else is drawn at the same time."""

    def __post_init__(self):
        object.__setattr__(self, "end_ids", tuple(self.end_ids))
        object.__setattr__(self, "bounds", tuple(self.bounds))
        self._check_numbers()
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature: got {self.temperature}, expected 0 (greedy) or at least 0.01: vLLM raises smaller ones to that")
        if not self.end_ids:
            raise ValueError(
                "end_ids: got none, expected the plain stream's end tokens: a tokenizer without an end token needs one named, else no answer ends"
            )
        if stray := [i for i in self.end_ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.vocab_size]:
            raise ValueError(f"end_ids: got {stray[0]!r}, expected token ids in [0, {self.vocab_size}): is vocab_size the tokenizer's?")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if len(self.bounds) != 2 or not 0 <= self.bounds[0] < self.bounds[1] <= 1:
            raise ValueError(f"bounds: got {self.bounds}, expected (low, high) with 0 <= low < high <= 1")
        if not isinstance(self.splitter, str) or "\ufffd" in self.splitter:
            raise ValueError(f"splitter: got {self.splitter!r}, expected text, or '' for none; U+FFFD stands for bytes that are no text")

    def _check_numbers(self) -> None:
        whole = {"vocab_size": 2, "max_tokens": 1, "repeat_ngram": 1, "repeat_count": 2, "repeat_every": 0, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}")
        finite = {"beta": (0.0, math.inf), "temperature": (0.0, math.inf), "center": (-math.inf, math.inf), "top_p": (0.0, 1.0)}
        for name, (low, high) in finite.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= high or (name == "top_p" and value == 0):
                where = "above 0 and at most 1" if name == "top_p" else f"of at least {low:g}"
                raise ValueError(f"{name}: got {value!r}, expected a finite number {where}")

    def for_engine(self) -> dict[str, Any]:
        """What the engine's processor has to know, as JSON; temperature, seed and max_tokens are vLLM's own parameters."""
        return {name: getattr(self, name) for name in ENGINE_FIELDS}

    @classmethod
    def from_engine(cls, values: Mapping[str, Any]) -> HintedOptions:
        """Of `for_engine`, as it came over the wire.  ValueError for unknown or missing fields and bad values."""
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"got the unknown option {unknown[0]!r} of hinted decoding: are both sides of one version?")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"options of hinted decoding: {error}") from None
