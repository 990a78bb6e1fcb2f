"""What ends a hinted answer, and how the splitter is found in a text that comes token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum

__all__ = ["EndReason", "IncrementalText", "Repetition", "SplitterFinder", "repeats"]

REPLACEMENT = "\ufffd"
WINDOW = 6  # tokens decoded again with the next one: a token's text can depend on those before it (a space at a word's start)
MAX_PENDING = 8  # tokens without a whole character: a UTF-8 character has 4 bytes, so these bytes are no text and never will be


class EndReason(str, Enum):
    EOS = "eos"
    """An end token of the plain stream was drawn.  It is the last token."""
    REPEATING = "repeating"
    LENGTH = "length"
    """max_tokens, or the context of the longer stream, is full."""


class IncrementalText:
    """The text of tokens that come one by one.  A character that is cut between tokens is held back until it is whole.

    decode: token ids -> text, such as tokenizer.decode.  Each token costs a decode of a few tokens, however long the text is."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode = decode
        self.context: list[int] = []
        """Tokens already given out that the next ones are decoded with."""
        self.given = ""
        """Their text."""
        self.pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that is whole now, and was not before: "" within a character."""
        self.pending.append(token)
        now = self.decode(self.context + self.pending)
        cut = now.endswith(REPLACEMENT)
        if cut and len(self.pending) < MAX_PENDING:
            return ""
        new = now[len(self.given) :]
        # what ends within a character must not be context: the character's last bytes would change its text
        self.context, self.given = ([], "") if cut else (self.context + self.pending, now)
        self.pending = []
        if len(self.context) > 2 * WINDOW:
            self.context = self.context[-WINDOW:]
            self.given = self.decode(self.context)
        return new


class SplitterFinder:
    """Whether an answer's text contains `splitter`, which may begin in one token and end in another."""

    def __init__(self, splitter: str, decode: Callable[[Sequence[int]], str]):
        self.splitter = splitter
        self.found = False
        self.text = IncrementalText(decode)
        self.tail = ""

    def add(self, token: int) -> bool:
        """Of the answer with this token."""
        if self.splitter and not self.found:
            self.tail += self.text.add(token)
            self.found = self.splitter in self.tail
            self.tail = self.tail[-(len(self.splitter) - 1) :] if len(self.splitter) > 1 else ""
        return self.found


def repeats(tokens: Sequence[int], ngram: int, count: int) -> bool:
    """Does any run of `ngram` tokens come `count` times, overlaps counted?  (The authors' loop leaves the last run out.)"""
    seen: Counter[tuple[int, ...]] = Counter()
    for start in range(len(tokens) - ngram + 1):
        run = tuple(tokens[start : start + ngram])
        seen[run] += 1
        if seen[run] >= count:
            return True
    return False


class Repetition:
    """`repeats`, looked at whenever another `every` tokens are there; 0: never."""

    def __init__(self, ngram: int, count: int, every: int):
        self.ngram, self.count, self.every = ngram, count, every

    def due(self, tokens: Sequence[int]) -> bool:
        """Is this the moment to look, and is there a repetition?"""
        return bool(self.every and tokens and len(tokens) % self.every == 0) and repeats(tokens, self.ngram, self.count)
