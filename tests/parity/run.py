"""Every cell beside its peer; writes docs/parity.md.

    make test-parity                                  # all peers, and the page
    python -m tests.parity.run verl Liger             # some of them, printed only

A peer runs in a process of its own with its wheel first on the Python path (tests/wheels.py fetches it), so that no two see each other.
Exit code 1 when a cell neither agrees, nor is a preset, nor is explained, nor is within its ulp, or when a peer does not run.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.wheels import VERL, fetch_packages

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/parity.md"
TIMEOUT_S = 300
BEGIN = '{"cells"'


@dataclass(frozen=True)
class Peer:
    module: str
    """Of tests.parity, with CELLS, NOT_COMPARED, HOW and, without wheels, VERSION."""
    wheels: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


PEERS = {
    "TRL": Peer("trl_cells"),
    "verl": Peer("verl_cells", VERL),
    "Trinity-RFT": Peer("trinity_cells", ("trinity-rft==0.6.0",)),
    "ms-swift": Peer("swift_cells", ("ms-swift==4.6.0",)),
    "Liger": Peer("liger_cells", ("liger-kernel==0.8.5",), (("TRITON_INTERPRET", "1"),)),
    "released code": Peer("frozen_cells"),
}


def rows_of(module: str) -> dict:
    """Judged here: {"cells": [[theirs, ours, inputs, values, gradients, verdict, ok], ...], "not": [...], "how": ..., "version": ...}."""
    from tests.parity.cell import judge

    found = importlib.import_module(f"tests.parity.{module}")
    rows = []
    for cell in found.CELLS:
        outcome = judge(cell)
        said = cell.said or ", ".join(cell.inputs)
        rows.append([cell.theirs, cell.ours, said, _numbers(outcome.value), _numbers(outcome.grad), outcome.verdict, outcome.ok])
    return {"cells": rows, "not": list(found.NOT_COMPARED), "how": found.HOW, "version": getattr(found, "VERSION", "")}


def _numbers(found: dict[str, float | None]) -> str:
    """fp32, then fp64 in brackets."""
    single, double = found.get("fp32"), found.get("fp64")
    if single is None and double is None:
        return "-"
    if single is None:
        return f"({double:.0e})"
    return f"{single:.0e}" + ("" if double is None else f" ({double:.0e})")


def run(peer: Peer) -> dict | str:
    """What `rows_of` gives in a process of the peer's own, or why it did not run."""
    try:
        folder = fetch_packages(*peer.wheels) if peer.wheels else None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return f"not run: its wheels could not be fetched ({type(error).__name__})"
    path = os.pathsep.join(str(place) for place in (folder, ROOT) if place)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | dict(peer.environment)
    try:
        done = subprocess.run([sys.executable, "-m", "tests.parity.run", "--rows", peer.module], env=environment, cwd=ROOT, capture_output=True,
                              text=True, timeout=TIMEOUT_S)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not run: no end after {TIMEOUT_S} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(BEGIN)]
    if done.returncode or not lines:
        print(done.stderr[-4000:], file=sys.stderr)
        return f"not run: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1][:200]}"
    return json.loads(lines[-1])


def page(found: dict[str, dict | str]) -> str:
    """docs/parity.md."""
    cells = [row for result in found.values() if isinstance(result, dict) for row in result["cells"]]
    kinds = [sum(row[5].startswith(kind) for row in cells) for kind in ("agrees", "preset", "explained", "within")]
    text = HEADER.format(date=datetime.date.today(), python=platform.python_version(), torch=version("torch"), cells=len(cells), agrees=kinds[0],
                         presets=kinds[1], explained=kinds[2], within=kinds[3], sevens=sum(row[2] == "12 rewards of 0.7" for row in cells), wrong=sum(not row[6] for row in cells))  # fmt: skip
    for name, result in found.items():
        text += f"\n## {name}\n\n"
        wheel = " ".join(PEERS[name].wheels[:1]).replace("==", " ")
        if isinstance(result, str):
            text += f"{wheel or name}: {result}\n"
            continue
        text += f"{wheel or result['version']}: {result['how']}.\n\nNot compared: {', '.join(result['not'])}.\n\n"
        text += "| theirs | ours | inputs | value | gradient | verdict |\n|---|---|---|---|---|---|\n"
        text += "".join(f"| {' | '.join(_code(row[:2]) + row[2:6])} |\n" for row in result["cells"])
    return text


def rows_on_page(peer: str) -> list[tuple[str, str]]:
    """(theirs, ours) of each row of its section, as the page has them now."""
    section = PAGE.read_text().partition(f"\n## {peer}\n")[2].partition("\n## ")[0]
    return [tuple(re.findall(r"`(.+?)` \|", line)[:2]) for line in section.splitlines() if line.startswith("| `")]


def _code(names: list[str]) -> list[str]:
    return [f"`{name}`" for name in names]


HEADER = """# Parity with other implementations

Made by `make test-parity` on {date}: Python {python}, torch {torch}, CPU.  {cells} cells: {agrees} agree, {presets} are presets of ours named after
their source, {explained} are explained, {within} in half precision within an ulp of it, {wrong} wrong.

Each row is one function of a peer beside ours on the same logits, labels, masks, log-probabilities and rewards.  **value** and **gradient** (by the
logits) are the largest differences over all inputs, in fp32 and, in brackets, in fp64: of values |ours - theirs| / max(1, |theirs|), of gradients
over the largest entry.  A row passes within 1e-5 in fp32 (2e-7 in fp64: the normaliser's coefficients are fp32); the one of
bf16 logits within 2^-7.  **explained**: as it stands ours
differs, by what the verdict says, and with that deviation switched on, in the way it says, ours gives the peer's numbers: those are the differences
shown.  A row whose explanation no longer explains anything fails as well.  Two kinds of explained rows call less of ours than the rest: "12 rewards of 0.7"
({sevens} rows) is the peer's formula in fp32, written out in the test; "groups of one" of a peer that makes them 0 is ours on two equal answers, 0 as well.

Inputs (`tests/parity/case.py`): *plain*; *ugly*, temperature 0.7, logits of +-40 on the label, ratios of 20; *hot*, temperature 1.7, masks with
holes; *gap*, two answers without a trained token.  All have ragged lengths from 1 up, labels from likely to absurd, ratios beyond every clip,
both signs of the advantage and a group whose advantages are 0.
"""


def main(chosen: list[str]) -> int:
    warnings.simplefilter("ignore")
    if chosen[:1] == ["--rows"]:
        print(json.dumps(rows_of(chosen[1])), flush=True)
        return 0
    unknown = sorted(set(chosen) - set(PEERS))
    if unknown:
        print(f"got {', '.join(unknown)}, expected some of {', '.join(PEERS)}", file=sys.stderr)
        return 2
    found = {}
    for name in chosen or PEERS:
        found[name] = result = run(PEERS[name])
        for row in [[name, "", "", "", "", result, False]] if isinstance(result, str) else result["cells"]:
            print(f"{name:<14} {row[0]:<72} {row[3]:<16} {row[4]:<16} {row[5]}", flush=True)
    if not chosen:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(found))
    return 0 if all(isinstance(result, dict) and all(row[6] for row in result["cells"]) for result in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
