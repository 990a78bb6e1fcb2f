"""The embedded data: short arithmetic word problems with worked answers, so that a demo needs no download.

    {"question": "Tom has 5 apples, finds 7, loses 9. How many?", "answer": "5+7=12\\n12-9=3\\n#### 3"}

| split | operations | for |
|---|---|---|
| warm | 1 to 3 | a broad warm start: a model that can do a little of everything |
| train | 1 or 2 | fine-tuning, in the narrower distribution; enough to learn from scratch too |
| heldout | 2 | in distribution: known facts (a+b) in combinations seen in neither warm nor train |
| ood | 3 | out of train's distribution: one operation more, in combinations seen in neither |
| expert | 2 or 3 | on-policy: the demonstrations |
| prompts | 2 or 3 | on-policy: the questions that are sampled, of which none is among the demonstrations |

Measured, one seed: 4 layers, hidden 128, RoPE, 16 rows of 128 tokens a step, lr 2e-3, cosine, from scratch on `train`: greedy accuracy on
heldout .12, .34, .72, .98 after 150, 300, 450, 600 steps (.15 s each on one free core); ood stays near .06 (guessing), hence `warm`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

__all__ = ["SPLITS", "extract_answer", "generate", "write_arithmetic"]

SPLITS = {"warm": 8000, "train": 8000, "heldout": 200, "ood": 200, "expert": 1000, "prompts": 2000}  # and how many problems a demo wants of each

NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Mia", "Sam", "Zoe")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
WORDING = {
    "+": ("finds {n}", "buys {n}", "gets {n}"),
    "-": ("loses {n}", "sells {n}", "eats {n}"),
    "*": ("makes it times {n}",),
}
FILLERS = ("So", "Now", "Well", "Then")  # words that carry nothing, for demonstrations whose style is not the model's own
STEPS = {"warm": (1, 2, 2, 3, 3), "train": (1, 2, 2, 2), "heldout": (2,), "ood": (3,), "expert": (2, 3), "prompts": (2, 3)}  # drawn from, evenly
MOST = 50_000  # of each split: every one has more distinct questions than that
LARGEST = 20  # of each value on the way: some 300 facts, few enough to learn in a minute

Problem = tuple[int, tuple[tuple[str, int], ...]]  # the first number, then (operation, operand) in turn


def generate(split: str, count: int, seed: int, *, filler: float = 0.0, largest: int = LARGEST, hasty: float = 0.0) -> list[dict[str, str]]:
    """`count` distinct problems of a split as {"question", "answer"}; the same arguments give the same text.

    `filler`: probability of a meaningless word before a worked line, in the answers only.  `largest`: of each value on the way, at most 20.
    `hasty`: share of the answers, to more than one operation, that stop after an earlier line and give its value: a habit that costs the answer,
    and that reinforcement can unlearn.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    if not 1 <= count <= MOST:
        raise ValueError(f"count: got {count}, expected 1 to {MOST} problems")
    rng = random.Random(f"megatron-plugin arithmetic {split} {seed}")
    style = random.Random(f"megatron-plugin style {split} {seed}")  # of its own, so that the problems are the same with and without fillers
    found: dict[str, str] = {}
    while len(found) < count:
        problem = _draw(split, rng, largest)
        if problem is not None:
            found.setdefault(_question(problem, rng), _answer(_hurried(problem, style, hasty), style, filler))
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def write_arithmetic(directory: str | Path, seed: int, *, counts: Mapping[str, int] = SPLITS, filler: float = 0.0) -> dict[str, Path]:
    """<directory>/<split>.jsonl for each split, and their paths.  Several ranks may do so at once: a file appears complete or not."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, count in counts.items():
        # Only the demonstrations to fine-tune on take the foreign style; the splits that measure stay clean.
        lines = generate(split, count, seed, filler=filler if split in ("train", "expert") else 0.0)
        paths[split] = folder / f"{split}.jsonl"
        temporary = folder / f".{split}.{uuid.uuid4().hex}.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, paths[split])
    return paths


def extract_answer(text: str) -> str | None:
    """The number after the first "####", without thousands separators, currency sign and trailing zeros; None where there is none.

    The first, as in GSM8K's own evaluation: what a model goes on to write after its answer does not count.
    """
    text = re.sub(r"\s+", " ", text)  # three optional spaces in a row take cubic time: 25 s for 2000 line breaks
    found = re.search(r"####\s*([-+]?)\s*\$?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)", text)
    if found is None:
        return None
    whole, _, fraction = found.group(2).replace(",", "").partition(".")
    number = (whole.lstrip("0") or "0") + ("." + fraction.rstrip("0") if fraction.strip("0") else "")
    return "-" + number if found.group(1) == "-" and number != "0" else number


def apply(value: int, operation: str, operand: int) -> int:
    """One step of a problem."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operation]


def _draw(split: str, rng: random.Random, largest: int) -> Problem | None:
    """A problem of the split, or None when the one drawn leaves the range or is kept for another split."""
    first = value = rng.randint(2, 15)
    operations = []
    for _ in range(rng.choice(STEPS[split])):
        operation = rng.choice("++--*")
        operand = rng.randint(2, 3) if operation == "*" else rng.randint(1, 9)
        value = apply(value, operation, operand)
        if not 1 <= value <= largest:
            return None
        operations.append((operation, operand))
    problem = first, tuple(operations)
    if first > largest or _is_kept(problem) != (split in ("heldout", "ood")):
        return None
    wrong_half = split in ("expert", "prompts") and _is_for_prompts(problem) != (split == "prompts")
    return None if wrong_half else problem


def _is_kept(problem: Problem) -> bool:
    """Whether a problem is kept for evaluation: a hash of its numbers decides, so this holds for any seeds and counts."""
    return hashlib.sha256(repr(problem).encode()).digest()[0] < 26


def _is_for_prompts(problem: Problem) -> bool:
    """The same for expert and prompts, which share no problem."""
    return hashlib.sha256(repr(problem).encode()).digest()[1] >= 128


def _hurried(problem: Problem, style: random.Random, hasty: float) -> Problem:
    """The problem as an answer takes it: whole, or cut after an earlier operation."""
    first, operations = problem
    if not hasty or len(operations) < 2 or style.random() >= hasty:
        return problem
    return first, operations[: style.randint(1, len(operations) - 1)]


def _question(problem: Problem, rng: random.Random) -> str:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    steps = [rng.choice(WORDING[operation]).format(n=operand) for operation, operand in problem[1]]
    return f"{', '.join([f'{name} has {problem[0]} {item}', *steps])}. How many?"


def _answer(problem: Problem, style: random.Random, filler: float) -> str:
    value, lines = problem[0], []
    for operation, operand in problem[1]:
        result = apply(value, operation, operand)
        word = style.choice(FILLERS) + " " if style.random() < filler else ""
        lines.append(f"{word}{value}{operation}{operand}={result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])
