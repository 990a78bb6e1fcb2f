"""What a data file holds, without training on it: `megatron-plugin doctor --data`.

    scan = scan_file("x.jsonl")                                   # structure only: tens of thousands of lines a second
    scan = scan_file("x.jsonl", encoder=ConversationEncoder(tokenizer), seq_length=4096)
    print("\\n".join(scan.report()))

Lines are read by what reads them for training (messages.iter_lines), tokenised by what tokenises them, so both find the same lines bad.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plugin.data.errors import DataError
from megatron_plugin.data.messages import Conversation, iter_lines
from megatron_plugin.data.packing import too_long
from megatron_plugin.data.tokenize import ConversationEncoder

__all__ = ["Scan", "scan_file"]


@dataclass
class Scan:
    """One file.  Memory: a number or two per line, and the first bad lines."""

    path: str
    shown: int
    """Bad lines of which the error is kept."""
    lines: int = 0
    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """Bad lines by DataError.kind."""
    first: list[DataError] = field(default_factory=list)
    turns: Counter[str] = field(default_factory=Counter)
    """Turns of the good lines, by role."""
    trained: int = 0
    """Turns that have a loss."""
    empty: Counter[str] = field(default_factory=Counter)
    """Turns without text, by role: only those that need none (system, developer, tool); an empty question or answer makes the line bad."""
    duplicates: int = 0
    """Good lines that say the same as an earlier one."""
    twice: str = ""
    """The first such line, as "file:line repeats line n"."""
    longest: tuple[int, str] = (0, "")
    """Characters, and file:line."""
    longest_tokens: tuple[int, str] = (0, "")
    tokens: array = field(default_factory=lambda: array("I"))
    """Of each good line, where there was a tokenizer."""
    problem: DataError | None = None
    """Why the file cannot be read, or not to its end."""

    def report(self) -> Iterator[str]:
        """Lines for a person: the counts, then the first bad lines as file:line: reason."""
        if self.problem is not None:
            yield str(self.problem)
            return
        yield f"{self.path}: {self.lines} lines, {self.good} good, {sum(self.bad.values())} bad, {self.duplicates} duplicates"
        for kind, count in self.bad.most_common():
            yield f"  bad {count:>9}  {kind}"
        if self.good:
            yield "  turns          " + ", ".join(f"{role} {count}" for role, count in self.turns.most_common()) + f"; {self.trained} trained"
            yield f"  longest        {self.longest[0]} characters ({self.longest[1]})"
        if self.empty:
            yield "  empty          " + ", ".join(f"{role} {count}" for role, count in self.empty.most_common())
        if self.twice:
            yield f"  duplicates     the first: {self.twice}"
        if self.tokens:
            length = sorted(self.tokens)
            median, most, nearly = (length[int(share * (len(length) - 1))] for share in (0.5, 0.9, 0.99))
            yield f"  tokens         {sum(length)}; a line: median {median}, 90 % {most}, 99 % {nearly}, longest {self.longest_tokens[0]} ({self.longest_tokens[1]})"
        yield from map(str, self.first)
        if hidden := sum(self.bad.values()) - len(self.first):
            yield f"and {hidden} more bad lines (--show)"


def scan_file(
    path: str | Path, *, train_on: str = "all", encoder: ConversationEncoder | None = None, seq_length: int = 0, shown: int = 20
) -> Scan:
    """Everything about a file; what is wrong with it is in the result, nothing is raised.

    `encoder`: also tokenise each line, which is a hundred times slower; with it, `seq_length` tokens are the most a line may have (0: any)."""
    scan = Scan(str(path), shown)
    seen: dict[Any, Any] = {}
    try:
        for item in iter_lines(path, train_on=train_on):
            scan.lines += 1
            if not isinstance(item, DataError) and encoder is not None:
                item = _tokenised(scan, item, encoder, seq_length)
            if isinstance(item, DataError):
                scan.bad[item.kind] += 1
                if len(scan.first) < shown:
                    scan.first.append(item)
            else:
                _count(scan, item, seen)
        if not scan.lines:
            raise DataError("got an empty file, expected one JSON object per line", str(path))
    except DataError as error:
        scan.problem = error
    return scan


def _tokenised(scan: Scan, conversation: Conversation, encoder: ConversationEncoder, seq_length: int) -> Conversation | DataError:
    try:
        sample = encoder.encode(conversation)
    except DataError as error:
        return error
    tokens = len(sample.tokens_T)
    scan.tokens.append(tokens)
    scan.longest_tokens = max(scan.longest_tokens, (tokens, sample.source), key=lambda item: item[0])
    return too_long(sample, seq_length) if seq_length and tokens > seq_length else conversation


def _count(scan: Scan, conversation: Conversation, seen: dict[int, int]) -> None:
    scan.good += 1
    size = 0
    for message in conversation.messages:
        size += len(message.content)
        scan.turns[message.role] += 1
        scan.trained += message.train
        if not message.content.strip():
            scan.empty[message.role] += 1
    if size > scan.longest[0]:
        scan.longest = size, conversation.source
    # 64 bits instead of the text: at 10^9 lines the chance that one is called a duplicate wrongly is 3 %
    said = hash(tuple(itertools.chain.from_iterable((message.role, message.content) for message in conversation.messages)))
    earlier = seen.setdefault(said, scan.lines)
    if earlier != scan.lines:
        scan.duplicates += 1
        scan.twice = scan.twice or f"{conversation.source} repeats line {earlier}"
