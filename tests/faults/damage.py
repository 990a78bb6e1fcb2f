"""What happens to a line of a data file: each function takes a good record and an rng, and returns the damaged line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

ROW = 160
"""Tokens that a line may have."""

Damage = Callable[[dict, random.Random], bytes]


def talk(record: dict, **changed) -> dict:
    """The record as messages, its answer with what is changed; "left out": without that key."""
    answer = {"role": "assistant", "content": record["answer"], **changed}
    return {"messages": [{"role": "user", "content": record["question"]}, {key: value for key, value in answer.items() if value != "left out"}]}


def dumped(record: dict) -> bytes:
    return json.dumps(record).encode()


def not_utf8(record, rng):
    text = dumped(record)
    place = rng.randrange(14, len(text) - 2)
    return text[:place] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x80"]) + text[place:]


def cut(record, rng):
    text = dumped(record)
    return text[: rng.randrange(1, len(text))]


def holes(record, rng):
    text = bytearray(dumped(record))
    start, size = rng.randrange(len(text) - 8), rng.randrange(1, 8)
    text[start : start + size] = b"\0" * size
    return bytes(text)


def raw(record: dict, mark: str, value: str) -> bytes:
    return dumped(record).replace(f'"{mark}"'.encode(), value.encode())


def empty(record, rng):
    text = rng.choice(["", " ", "\n\t ", "\u00a0"])
    return dumped(rng.choice([{**record, "answer": text}, talk(record, content=text), {**record, "question": text}]))


def wrong_type(record, rng):
    value = rng.choice([7, 1.5, True, None, [], {}, ["a"], [{"type": "text", "text": "a"}]])
    return dumped(rng.choice([talk(record, content=value), {**record, "answer": value}, {"messages": value}]))


KINDS: dict[str, tuple[Damage, str]] = {
    "bad UTF-8": (not_utf8, "not UTF-8"),
    "cut JSON": (cut, "not valid JSON"),
    "NUL bytes": (holes, "not valid JSON"),
    "two objects in a line": (lambda record, rng: dumped(record) + rng.choice([b"", b" ", b","]) + dumped(record), "not valid JSON: Extra data"),
    "a byte order mark within the file": (lambda record, rng: b"\xef\xbb\xbf" + dumped(record), "not valid JSON"),
    "wrong role": (lambda record, rng: dumped(talk(record, role=rng.choice(["human", "gpt", "User", "", 7, None, []]))), r"\.role is wrong"),
    "missing key": (
        lambda record, rng: dumped(rng.choice([{"question": "a"}, {"prompt": "b"}, talk(record, role="left out"), talk(record, content="left out")])),
        "missing key|has no 'role'|has no 'content'",
    ),
    "empty answer": (empty, "is empty"),
    "wrong types": (wrong_type, "is wrong|has no 'role'"),
    "nested too deep": (
        lambda record, rng: rng.choice([b"[", b'{"a":']) * rng.randrange(100_000, 150_000), "not usable JSON|not valid JSON|line too long"
    ),
    "half a surrogate pair": (lambda record, rng: raw({**record, "answer": "X"}, "X", rf'"a\ud83{rng.choice("def")}"'), "half a surrogate pair"),
    "NaN as a weight": (
        lambda record, rng: raw(talk(record, weight="W"), "W", rng.choice(["NaN", "Infinity", "-Infinity", "1e400", "-1"])), "weight is wrong"
    ),
    "blank line": (lambda record, rng: rng.choice([b"", b" ", b"\t\r"]), "empty line"),
    "a key twice": (lambda record, rng: dumped(record)[:-1] + b', "answer": "another"}', "one key twice"),
    "no object": (lambda record, rng: rng.choice([b"null", b"7", b'"text"', b"[]", b'["a", "b"]', b"true"]), "got a JSON"),
    "a control token": (lambda record, rng: dumped({**record, "question": "a<|eos|><|assistant|>b"}), "control token '<|eos|>'".replace("|", r"\|")),
    "too long": (lambda record, rng: dumped({**record, "answer": "1 " * rng.randrange(ROW, 2 * ROW)}), "too long .got [0-9]+ tokens"),
}
"""Kind -> (damage, what the reason must say)."""
