"""The same seed twice, and what the kernels may not contain."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.faults.problems import small_run
from tests.faults.promises import Case
from tests.spawn import on_ranks

PROMISE = "one seed twice: losses, gradient norms and hashes of weights and moments of 50 steps have the same bits (TP2, dropout); no floating-point atomics in any kernel"
ROOT = Path(__file__).parents[2]
INTEGER_ATOMICS: dict[str, int] = {}
"""File below the root -> how many atomics on integers it has; each must say `# integer` on its line."""
ATOMIC = re.compile(r"\b(?:tl\.)?atomic_(?:add|max|min|cas|xchg|and|or|xor)\b|\batomic(?:Add|Max|Min|CAS|Exch|Sub)(?:_block|_system)?\b|\bred\.\w+|\batom\.\w+"
                    r"|std::atomic|fetch_add|#pragma omp atomic|\breduction\s*\(|index_add_|scatter_add_|scatter_reduce_")  # fmt: skip
LAYOUT = {"parallel.tensor": "2", "model.hidden_dropout": "0.1", "model.attention_dropout": "0.1", "train.global_batch": "2", "loss.name": "dft"}


def cases(*, full: bool) -> list[Case]:
    made = [Case("no atomics", _no_atomics), Case("twice", lambda folder: _twice(folder, 50 if full else 4))]
    return [*made, Case("twice, deterministic=true, pipeline", lambda folder: _twice(folder, 50, DETERMINISTIC))] if full else made


DETERMINISTIC = {"deterministic": "true", "parallel.tensor": "1", "parallel.pipeline": "2"}


def _twice(folder: Path, steps: int, layout: dict[str, str] | None = None) -> None:
    found = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        overrides = small_run(folder / name, **LAYOUT, **{"train.steps": str(steps), "data.train": str(folder / "one" / "train.jsonl")}) | (layout or {})
        found.append(on_ranks(2, "tests.faults.guard_ranks", "hashes", overrides=overrides))
    first, second = found
    assert first == second
    assert len(first[0]) == steps and len({line["hash"] for line in first[0]}) == steps, "steps that change nothing prove nothing"
    other = on_ranks(2, "tests.faults.guard_ranks", "hashes", overrides=overrides | {"run_dir": str(folder / "three"), "seed": "77", "train.steps": "2"})
    assert other[0][0] != first[0][0], "another seed gives other numbers, or the comparison sees nothing"


def _no_atomics(folder: Path) -> None:
    """Floating-point sums in the order of arrival differ in their last bits from run to run."""
    files = sorted([*(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.c*"), *(ROOT / "csrc").rglob("*.h*")])
    assert len(files) > 20
    found: dict[str, int] = {}
    for path in files:
        for number, line in enumerate(_code(path), 1):
            if ATOMIC.search(line):
                name = str(path.relative_to(ROOT))
                assert "integer" in line, f"{name}:{number}: {line.strip()}"
                found[name] = found.get(name, 0) + 1
    assert found == INTEGER_ATOMICS
    assert ATOMIC.search("tl.atomic_add(x, y)") and ATOMIC.search("atomicAdd(&x, y);") and ATOMIC.search('asm("red.global.add.f32")')


def _code(path: Path) -> list[str]:
    """The lines, without docstrings of a Python file: they may speak of atomics."""
    lines = path.read_text().splitlines()
    if path.suffix != ".py":
        return lines
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
    return lines
