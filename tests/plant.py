"""Plant one-line faults in a copy of the tree; the test named for each must fail.  A fault that survives is a hole in the suite.

The faults are in mutants/, which also starts this.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEEP = ("kernels", "csrc", "megatron_plugin", "tests", "examples", "benchmarks", "configs", "pyproject.toml", "README.md", "SECURITY.md", "requirements", "docs",
        "LICENSE", "mkdocs.yml")
WORKERS = int(os.environ.get("MUTANT_WORKERS", "2"))
TIMEOUT_S = 900


@dataclass(frozen=True)
class Mutant:
    name: str
    """What went wrong, as one would say it in a post-mortem."""
    file: str
    old: str
    new: str
    killer: str
    """pytest selection that must fail."""


def _copy() -> Path:
    copy = Path(tempfile.mkdtemp(prefix="mutant-"))
    for name in KEEP:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


def _pytest(tree: Path, selection: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *shlex.split(selection)]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)


def _failed_test(output: str) -> str | None:
    return next((line.split(" - ")[0].split(" ", 1)[1] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))), None)


def run(mutant: Mutant) -> str | None:
    """The test that killed the mutant, or None if it survived.  AssertionError when the fault cannot be planted."""
    tree = _copy()
    try:
        target = tree / mutant.file
        text = target.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times, expected once"
        target.write_text(text.replace(mutant.old, mutant.new))
        result = _pytest(tree, mutant.killer)
        if result.returncode < 0:  # a wild pointer ends the interpreter, and with it the test run
            return f"{mutant.killer} (crashed with signal {-result.returncode})"
        return _failed_test(result.stdout) if result.returncode == 1 else None
    except subprocess.TimeoutExpired:
        return None
    finally:
        shutil.rmtree(tree)


TABLE = ROOT / "tests" / "MUTANTS.md"


def write_table(mutants: list[Mutant], killers: dict[str, str]) -> None:
    """Rows of the faults that were run, over those of earlier runs; a fault that no longer exists leaves the table."""
    rows = dict(re.findall(r"^\| (.+?) \| \S+ \| `(.+?)` \|$", TABLE.read_text(), re.M)) if TABLE.exists() else {}
    rows |= {name: killer.split("[")[0] for name, killer in killers.items()}
    lines = ["# Planted faults and the test that catches each", "", "Written by `make test-mutants`.", "", "| fault | planted in | killed by |", "|---|---|---|"]
    lines += [f"| {m.name} | {m.file} | `{rows.get(m.name, 'not run')}` |" for m in mutants]
    TABLE.write_text("\n".join(lines) + "\n")


def main(mutants: list[Mutant], words: list[str]) -> int:
    """Run those whose name holds a word, and keep the table; 1 if one survives."""
    chosen = [m for m in mutants if not words or any(w in m.name for w in words)]
    tree = _copy()
    where = subprocess.run([sys.executable, "-c", "import megatron_plugin; print(megatron_plugin.__file__)"], cwd=tree, text=True,
                           env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, check=True).stdout
    assert str(tree) in where, f"the copy is not what is imported: {where}"
    selections = sorted({m.killer.split(" -k ")[0] for m in chosen})
    clean = _pytest(tree, " ".join(selections))
    shutil.rmtree(tree)
    if clean.returncode != 0:
        print(f"without any fault {_failed_test(clean.stdout)} fails: nothing can be learnt\n{clean.stdout[-2000:]}")
        return 1
    with ThreadPoolExecutor(WORKERS) as pool:
        killers = []
        for mutant, killer in zip(chosen, pool.map(run, chosen), strict=True):
            killers.append(killer)
            print(f"{'killed  ' if killer else 'SURVIVED'}  {mutant.name}  {killer or mutant.killer}", flush=True)
    survivors = sum(killer is None for killer in killers)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed", flush=True)
    write_table(mutants, {m.name: killer or "SURVIVED" for m, killer in zip(chosen, killers, strict=True)})
    return 1 if survivors else 0
