"""The task: worked column addition and subtraction of three-digit numbers, a character a token; and facts that can only be known by heart.

    438+275=        8513 7312 4207 :0713$     the long style: from the right, per column the two digits, the carry, the digit of the result
                      13   12   07 :0713$     the short style: the carry and the digit alone
    a8513b7312a4207:0713$                     the expert: long, with probability `filler` a letter before a column, which the base never saw

(Blanks for the eye only.)  In the long style the two digits of an addition come in either order: many right ways to one answer.  Short answers are
more often wrong: a column has to be found and added in one go.  A fact is `12@345=` -> `:907$`: three digits fixed by the first two, the rest is noise.
Held-out problems are chosen by a hash, so that they are in no training set whatever the seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["ANSWER", "BASE", "DIGITS", "END", "HINT", "LONGEST", "PAD", "PROMPT", "VOCABULARY", "Facts", "Problem", "Style", "draw_problems", "expert_style", "is_right",
           "letters", "text"]  # fmt: skip

DIGITS = 3
PLUS, MINUS, AT, EQUALS, END, PAD, ANSWER, HINT = range(10, 18)
LETTERS = 16
FIRST_LETTER = 18
VOCABULARY = FIRST_LETTER + LETTERS
PROMPT = 2 * DIGITS + 2
"""Tokens of every prompt."""
LONGEST = 5 * DIGITS + 1 + (DIGITS + 1) + 1
"""Tokens of the longest answer: long style, a letter before every column."""
ZIPF = [1 / (rank + 1) for rank in range(LETTERS)]
HELD_OUT_OF = 16


@dataclass(frozen=True)
class Style:
    short: float = 0.5
    """Probability of the short style."""
    filler: float = 0.0
    """Probability of a letter before a column; letters are drawn by Zipf's law."""


BASE, EXPERT = Style(), Style(short=0.0)


@dataclass(frozen=True)
class Problem:
    prompt: tuple[int, ...]
    """PROMPT tokens."""
    result: tuple[int, ...]
    """The digits of the right answer."""

    def solved(self, style: Style, rng: random.Random) -> list[int]:
        """A right answer in that style, with its end token."""
        tokens, carry, plus = [], 0, self.prompt[DIGITS] == PLUS
        for column in reversed(range(DIGITS)):
            if column == DIGITS - 1:
                short = rng.random() < style.short
            upper, lower = self.prompt[column], self.prompt[DIGITS + 1 + column]
            if rng.random() < style.filler:
                tokens.append(FIRST_LETTER + rng.choices(range(LETTERS), ZIPF)[0])
            if not short:
                tokens += [lower, upper] if plus and rng.random() < 0.5 else [upper, lower]
            value = upper + lower + carry if plus else upper - lower - carry
            carry = int(not 0 <= value <= 9)
            tokens += [carry, value % 10]
        return [*tokens, ANSWER, *self.result, END]


@dataclass(frozen=True)
class Facts:
    """A fact's three digits for each of the first `count` keys 00, 01, ...; a table of its own for each seed."""

    table: tuple[tuple[int, ...], ...]

    @classmethod
    def made(cls, count: int, rng: random.Random) -> Facts:
        return cls(tuple(tuple(rng.randrange(10) for _ in range(DIGITS)) for _ in range(count)))

    def problem(self, rng: random.Random) -> Problem:
        key = rng.randrange(len(self.table))
        noise = [rng.randrange(10) for _ in range(2 * DIGITS - 2)]
        prompt = (key // 10, key % 10, AT, *noise, EQUALS)
        return Problem(prompt, self.table[key])

    @staticmethod
    def solved(problem: Problem) -> list[int]:
        return [ANSWER, *problem.result, END]


def draw_problems(count: int, operations: str, rng: random.Random, *, held_out: bool = False) -> list[Problem]:
    """Distinct problems of "+", "-" or "+-"; held out or not, never both."""
    found: dict[tuple[int, ...], Problem] = {}
    while len(found) < count:
        plus = rng.choice(operations) == "+"
        x, y = rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)
        x, y = (x, y) if plus else (max(x, y), min(x, y))
        prompt = (*_digits(x, DIGITS), PLUS if plus else MINUS, *_digits(y, DIGITS), EQUALS)
        if (zlib.crc32(bytes(prompt)) % HELD_OUT_OF == 0) == held_out:
            found.setdefault(prompt, Problem(prompt, tuple(_digits(x + y if plus else x - y, DIGITS + 1))))
    return list(found.values())


def is_right(answers_BN: Tensor, problems: Sequence[Problem]) -> Tensor:
    """[B] bool: the digits behind the last ':' are the result, and the end token follows them.  Row i answers problems[i]."""
    right = []
    for row, problem in zip(answers_BN.tolist(), problems, strict=True):
        tail = [*row[len(row) - row[::-1].index(ANSWER) :], PAD] if ANSWER in row else []
        expected = [*problem.result, END]
        right.append(tail[: len(expected)] == expected)
    return torch.tensor(right)


def letters(ids: Tensor) -> Tensor:
    """Which tokens are the expert's letters."""
    return ids >= FIRST_LETTER


def text(ids: Sequence[int]) -> str:
    """As one would read it."""
    signs = "0123456789+-@=$_:?" + "abcdefghijklmnop"
    return "".join(signs[i] for i in ids)


def expert_style(filler: float) -> Style:
    return replace(EXPERT, filler=filler)


def _digits(value: int, width: int) -> list[int]:
    return [int(sign) for sign in str(value).zfill(width)]
