"""Every command that the README and the pages print, as a person would type it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/index.md", "docs/multi-node.md", "docs/scale.md", "docs/options.md", "docs/replication.md", "docs/parity.md", "configs/README.md",
         "benchmarks/README.md")  # fmt: skip
STARTS = re.compile(r"(megatron-plugin|torchrun|python|make|pip|docker|cp|source) ")


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str
    """Without its comment; lines that end in a backslash are one."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def printed(page: str) -> list[Command]:
    """The commands of a page's indented and fenced blocks, in order."""
    found, fenced, joined, begin = [], False, "", 0
    for number, line in enumerate((ROOT / page).read_text("utf-8").splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
            continue
        text = line if fenced else line[4:] if line.startswith("    ") else ""
        text = re.sub(r"\s+# .*", "", text).strip()
        if joined or STARTS.match(text):
            begin = begin if joined else number
            joined += text
            if joined.endswith("\\"):
                joined = joined[:-1]
            else:
                found.append(Command(page, begin, " ".join(joined.split())))
                joined = ""
    return found


def every_command() -> list[Command]:
    return [command for page in PAGES if (ROOT / page).is_file() for command in printed(page)]
