"""docs/replication.md from the result files of the studies.

    python -m benchmarks.dynamics.page            # the newest result of each study in benchmarks/results
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks._machine import ROOT
from benchmarks.dynamics.study import formatted

__all__ = ["section", "write"]

ORDER = ("chord-entropy", "chord-shift", "chord-shift-far", "dft-generalise", "srft-stages", "realign")
PAGE = ROOT / "docs" / "replication.md"
START, END = "<!-- results: written by benchmarks/dynamics/page.py -->", "<!-- end of results -->"


def cell(values: list[float | None]) -> str:
    return "" if None in values else formatted(values)


def section(document: dict[str, Any], picture: str = "") -> str:
    """Of one study: claims, table, figure, and how it was made."""
    header, columns = document["header"], document["columns"]
    lines = [f"## {document['title']}", ""]
    if header.get("tiny"):
        lines += ["**TINY SETTINGS: this tests the code and shows nothing.**", ""]
    lines += ["| claim of the paper | number | mean ± standard error | found |", "|---|---|---|---|"]
    for claim in document["claims"]:
        values = [math.nan if value is None else value for value in claim["values"]]
        lines.append(f"| {claim['statement']} | {claim['rule']} | {formatted(values)} | **{claim['verdict']}** |")
    lines += ["", f"| arm | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {arm} | " + " | ".join(cell(row[name]) for name in columns) + " |" for arm, row in document["table"].items()]
    lines += ["", f"Control: {document['control']}.", *document["notes"], ""]
    if picture:
        lines += [f"![{document['title']}]({picture})", ""]
    lines += [f"`{header['command']} --seeds {' '.join(map(str, document['seeds']))}`: {document['seconds']:.0f} s of one core "
              f"({header['cpu'].split('(')[0].strip()}), code {document['code']}.  {makers(document)}", ""]  # fmt: skip
    return "\n".join(lines)


def makers(document: dict[str, Any]) -> str:
    """Which trees made the arms, oldest first."""
    groups: dict[tuple, list[tuple[str, str]]] = {}
    for arm, rows in document["made"].items():
        for made in rows:
            tree = f"commit {made['commit']}" + {True: " with uncommitted changes", False: "", None: " (state unknown)"}[made["dirty"]]
            state = "this code" if made["code"] == document.get("codes", {}).get(arm, document["code"]) else "earlier code, not run again since"
            state += f", {made['verified']}" if "verified" in made else ""
            groups.setdefault((state, tree), []).append((made["date"], arm))
    said = []
    for (state, tree), found in sorted(groups.items(), key=lambda group: min(group[1])):
        dates, arms = sorted(date for date, _ in found), sorted({arm for _, arm in found})
        until = "" if dates[0] == dates[-1] else f" to {dates[-1].split(' ', 1)[1]}"
        said.append(f"{len(found)} run{'s' * (len(found) > 1)} ({', '.join(arms)}): {tree}, {dates[0]}{until}; {state}.")
    return "Made by:\n\n" + "\n".join(f"- {line}" for line in said)


def write(page: Path = PAGE, results: Path = ROOT / "benchmarks" / "results") -> None:
    """Replace what stands between the two marks of the page."""
    sections = []
    for name in ORDER:
        found = sorted(results.glob(f"*-dynamics-{name}.json"))
        if not found:
            sections.append(f"## {name}\n\nNot run.\n")
            continue
        picture = Path("..") / found[-1].with_suffix(".png").relative_to(ROOT)
        sections.append(section(json.loads(found[-1].read_text()), str(picture)))
    text = page.read_text()
    before, rest = text.split(START)
    page.write_text(before + START + "\n\n" + "\n".join(sections) + END + rest.split(END)[1])


if __name__ == "__main__":
    write()
