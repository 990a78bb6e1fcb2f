"""Pairs of rows in an engine's batch: are they in step, what do they draw from next, what became of them.  Without vLLM; see vllm_mixing.py.

A pair is in step when at every step both its rows are in the batch and have drawn the same tokens.  A row that runs alone draws a token from
the wrong distribution, so its pair is broken for good: both rows are made to end at once, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_plugin.rollout.hinted.mixing import Phase, mix
from megatron_plugin.rollout.hinted.options import HintedOptions
from megatron_plugin.rollout.hinted.stops import EndReason, Repetition, SplitterFinder

__all__ = ["ARGUMENT", "STREAMS", "TAKEN_PATH", "PairMixer", "PairReport", "check_arguments", "stream_arguments"]

ARGUMENT = "megatron_plugin_hinted"  # key of a request's extra_args
TAKEN_PATH = "/megatron_plugin/pairs"  # of the server: how many halves it has taken
STREAMS = ("hinted", "plain")
KEPT = 100_000  # reports that nobody fetched, of callers that died


def stream_arguments(pair: str, stream: str, options: HintedOptions) -> dict[str, Any]:
    """extra_args of a request.  `pair`: the same in both requests of a pair, and in no others ever."""
    return {ARGUMENT: {"pair": pair, "stream": stream, "options": options.for_engine()}}


def check_arguments(arguments: Any) -> None:
    """ValueError for what `stream_arguments` would not have made."""
    if not isinstance(arguments, Mapping) or set(arguments) != {"pair", "stream", "options"}:
        raise ValueError(f"extra_args.{ARGUMENT}: got {arguments!r}, expected pair, stream and options")
    if not isinstance(arguments["pair"], str) or arguments["stream"] not in STREAMS:
        raise ValueError(
            f"extra_args.{ARGUMENT}: got pair={arguments['pair']!r}, stream={arguments['stream']!r}, expected a text and one of {STREAMS}"
        )
    HintedOptions.from_engine(arguments["options"])


@dataclass(frozen=True)
class PairReport:
    """What an engine says of a pair; JSON on the wire."""

    drawn: int
    """Tokens drawn from the mix by both rows."""
    unpaired: int
    """Steps in which one row was in the batch without the other."""
    broken: str | None
    """Why the pair is out of step; None: it never was."""
    ended: str | None
    """EndReason.REPEATING when the engine ended it: one more token, which means nothing, follows the drawn ones."""
    split_at: int | None
    """Tokens drawn when the splitter was found; from there on the plain stream alone spoke."""


@dataclass(eq=False)
class _Row:
    stream: str
    drawn: Sequence[int]
    """Tokens drawn by this row: vLLM's own list, which grows."""


@dataclass(eq=False)
class _Pair:
    options: HintedOptions
    finder: SplitterFinder
    repetition: Repetition
    tokens: list[int] = field(default_factory=list)
    mixed: int = 0
    unpaired: int = 0
    broken: str | None = None
    ended: EndReason | None = None
    split_at: int | None = None

    def take(self, rows: Mapping[str, _Row]) -> None:
        """Look at what both rows drew since the last step."""
        hinted, plain = (rows[stream].drawn for stream in STREAMS)
        if not len(hinted) == len(plain) == self.mixed:
            self.broken = f"after {self.mixed} tokens the hinted stream has {len(hinted)}, the plain one {len(plain)}"
        elif self.mixed and (hinted[-1] != plain[-1] or hinted[-1] < 0):
            self.broken = f"token {self.mixed - 1} is {hinted[-1]} in the hinted stream, {plain[-1]} in the plain one"
        elif self.mixed > len(self.tokens):
            self._add(hinted[-1])

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        if self.split_at is None and self.finder.add(token):
            self.split_at = len(self.tokens)
        if self.repetition.due(self.tokens):
            self.ended = EndReason.REPEATING

    def phase(self) -> Phase:
        if self.split_at is not None:
            return Phase.PLAIN
        return Phase.MIXED if self.mixed else Phase.FIRST

    def report(self) -> PairReport:
        return PairReport(self.mixed, self.unpaired, self.broken, self.ended and self.ended.value, self.split_at)


class PairMixer:
    """The rows of a batch that are halves of pairs.

    decode: token ids -> text, to look for the splitter; None: pairs with a splitter are broken at once."""

    def __init__(self, decode: Callable[[Sequence[int]], str] | None):
        self.decode = decode
        self.rows: dict[int, tuple[str, _Row]] = {}
        self.pairs: dict[str, _Pair] = {}
        self.begun = 0
        """Pairs of which a half has been in the batch, ever."""

    def seat(self, row: int, arguments: Mapping[str, Any] | None, drawn: Sequence[int]) -> None:
        """A request is at `row` from now on; arguments None: it is no half of a pair."""
        self.rows.pop(row, None)
        if arguments is not None:
            self.rows[row] = (arguments["pair"], _Row(arguments["stream"], drawn))
            if arguments["pair"] not in self.pairs:
                self.pairs[arguments["pair"]] = self._pair(
                    _options(tuple(_hashable(item) for item in sorted(arguments["options"].items())))
                )

    def clear(self, row: int) -> None:
        """Nobody is at `row`: finished, or preempted."""
        self.rows.pop(row, None)

    def move(self, source: int, target: int, swap: bool) -> None:
        moved, back = self.rows.pop(source, None), self.rows.pop(target, None)
        if moved is not None:
            self.rows[target] = moved
        if swap and back is not None:
            self.rows[source] = back

    def apply(self, logits_RV: Tensor) -> Tensor:
        """Writes over both rows of each pair: the same log m, or the end token alone.  Other rows are left as they are."""
        together: dict[HintedOptions, list[tuple[_Pair, int, int]]] = {}
        for key, rows in self._present().items():
            pair = self.pairs[key]
            if pair.broken is None and pair.ended is None:
                self._look(pair, {row.stream: row for row in rows.values()}, len(rows))
            if pair.broken is not None or pair.ended is not None:
                logits_RV[list(rows)] = -torch.inf
                logits_RV[list(rows), pair.options.end_ids[0]] = 0.0
            else:
                hinted, plain = sorted(rows, key=lambda row: STREAMS.index(rows[row].stream))
                together.setdefault(pair.options, []).append((pair, hinted, plain))
        for options, members in together.items():
            pairs, hinted, plain = (list(column) for column in zip(*members, strict=True))
            logm_NV = mix(logits_RV[hinted], logits_RV[plain], [pair.phase() for pair in pairs], options).to(logits_RV.dtype)
            logits_RV[hinted] = logm_NV
            logits_RV[plain] = logm_NV
            for pair in pairs:
                pair.mixed += 1
        return logits_RV

    def take_reports(self, keys: Sequence[str]) -> dict[str, PairReport]:
        """Of pairs that are over, which are forgotten with it.  Unknown keys are left out."""
        return {key: self.pairs.pop(key).report() for key in keys if key in self.pairs}

    def _present(self) -> dict[str, dict[int, _Row]]:
        present: dict[str, dict[int, _Row]] = {}
        for index, (key, row) in self.rows.items():
            present.setdefault(key, {})[index] = row
        return present

    def _look(self, pair: _Pair, streams: Mapping[str, _Row], rows: int) -> None:
        if rows == len(streams) == 2:
            pair.take(streams)
        else:
            pair.unpaired += 1
            pair.broken = f"after {pair.mixed} tokens the {next(iter(streams))} stream was in the batch {'alone' if rows == 1 else 'twice'}"

    def _pair(self, options: HintedOptions) -> _Pair:
        self.begun += 1
        while len(self.pairs) >= KEPT:
            del self.pairs[next(iter(self.pairs))]
        finder = SplitterFinder(options.splitter, self.decode or str)
        pair = _Pair(options, finder, Repetition(options.repeat_ngram, options.repeat_count, options.repeat_every))
        if options.splitter and self.decode is None:
            pair.broken = "the engine has no tokenizer to look for the splitter with"
        return pair


@lru_cache(maxsize=64)
def _options(items: tuple[tuple[str, Any], ...]) -> HintedOptions:
    return HintedOptions.from_engine(dict(items))


def _hashable(item: tuple[str, Any]) -> tuple[str, Any]:
    name, value = item
    return name, tuple(value) if isinstance(value, list) else value
