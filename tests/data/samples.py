"""Lines, conversations and samples the data tests share."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_plugin.data import IGNORE_INDEX, Conversation, Message, Sample

GSM8K = [
    {
        "question": "Natalia sold 48 clips in April and half as many in May. How many in all?",
        "answer": "She sold 48/2 = <<48/2=24>>24 in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
    },
    {"question": "Weng earns $12 an hour. How much for 50 minutes?", "answer": "A minute is 12/60 = $<<12/60=0.2>>0.2.\n#### 10"},
    {
        "question": "A farm has 1,200 hens — it sells 180. How many are left?",
        "answer": "1200-180 = <<1200-180=1020>>1,020 hens are left.\n#### 1,020",
    },
]
TEXTS = [text for line in GSM8K for text in line.values()] * 3


def write_jsonl(path: Path, lines: list) -> Path:
    """dicts as JSON, bytes as they are."""
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return path


def talk(*turns: tuple, source: str = "x.jsonl:1") -> Conversation:
    """talk(("user", "hi"), ("assistant", "ho", 0.5)): assistant turns are trained unless their weight is 0."""
    messages = [Message(role, content, role == "assistant" and rest != [0], *rest) for role, content, *rest in turns]
    return Conversation(tuple(messages), source)


def sample(length: int, first: int = 1, trained_from: int = 1, weight: float = 1.0, source: str = "x.jsonl:1") -> Sample:
    """Tokens first, first + 1, ...; trained from place `trained_from` on."""
    tokens_T = torch.arange(first, first + length)
    trained_T = torch.arange(length) >= trained_from
    return Sample(tokens_T, torch.where(trained_T, tokens_T, IGNORE_INDEX), trained_T.float() * weight, source)


def trained_text(tokenizer, encoded: Sample) -> list[str]:
    """The stretches of trained tokens, decoded."""
    trained = (encoded.labels_T != IGNORE_INDEX).tolist()
    pieces, current = [], []
    for token, yes in zip([*encoded.tokens_T.tolist(), 0], [*trained, False], strict=True):
        if yes:
            current.append(token)
        elif current:
            pieces.append(tokenizer.decode(current))
            current = []
    return pieces
