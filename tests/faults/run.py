"""Try every case of every promise and write tests/FAULTS.md: tries, failures, worst time.

    make test-faults                     everything
    python -m tests.faults.run saves     the promises named; other rows of the table stay
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

from tests.faults.promises import PROMISES, modules

TABLE = Path(__file__).parent.parent / "FAULTS.md"
HEAD = """# Promises, tried

Made by `make test-faults` (tests/faults/run.py), which rewrites the rows it runs.  A try is one fault; a failure is a try after which the promise
did not hold; the worst time is that of the slowest case, from the fault on where the case says so.

| promise | module | tries | failures | worst time | tried on |
|---|---|---|---|---|---|
"""


def attempt(module: ModuleType) -> dict:
    """One row of the table."""
    name, tries, worst, failed = module.__name__.rsplit(".", 1)[1], 0, 0.0, []
    for case in module.cases(full=True):
        tries, begin = tries + case.tries, time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
            try:
                seconds = case.run(Path(scratch))
            except (Exception, pytest.fail.Exception, pytest.skip.Exception):  # pytest's are not Exceptions; Ctrl-C goes through
                failed.append(case.name)
                traceback.print_exc()
                seconds = None
        worst = max(worst, time.perf_counter() - begin if seconds is None else seconds)
        print(f"{name}: {case.name}: {'FAILED' if case.name in failed else 'held'}, {time.perf_counter() - begin:.1f} s", flush=True)
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)tests/FAULTS.md")
    return {"promise": module.PROMISE, "module": name, "tries": tries, "failures": f"{len(failed)}{' (' + ', '.join(failed) + ')' if failed else ''}",
            "worst": f"{worst:.1f} s", "on": f"{date.today()}, {commit}{' and changes' if changed else ''}"}  # fmt: skip


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=TABLE.parent, capture_output=True, text=True).stdout.strip()


def _rows() -> dict[str, str]:
    """The rows that the table has, by module."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return {line.split("|")[2].strip(): line for line in lines if line.startswith("|") and "---" not in line and not line.startswith("| promise")}


def main(names: list[str]) -> int:
    """0 when every promise held."""
    unknown = sorted(set(names) - set(PROMISES))
    if unknown:
        print(f"got {', '.join(unknown)}, expected some of {', '.join(PROMISES)}", file=sys.stderr)
        return 2
    held = True
    for module in modules():
        if names and module.__name__.rsplit(".", 1)[1] not in names:
            continue
        row = attempt(module)
        held = held and row["failures"] == "0"
        rows = _rows() | {row["module"]: "| " + " | ".join(str(value) for value in row.values()) + " |"}
        TABLE.write_text(HEAD + "".join(rows[name] + "\n" for name in PROMISES if name in rows))
        print(json.dumps(row))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
