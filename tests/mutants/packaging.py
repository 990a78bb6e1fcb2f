"""Faults of packaging, types and the site.  Rows of `make test-mutants`."""

from tests.plant import Mutant

WHEEL, LOCKS, TYPES, SITE = (f"tests/packaging/test_{name}.py" for name in ("wheel", "requirements", "types", "site"))
MUTANTS = [
    Mutant("the wheel has no C++ headers", "pyproject.toml", '["*.cpp", "*.h", "*.cu", "*.cuh"]', '["*.cpp", "*.cu", "*.cuh"]', f"{WHEEL} -k every_file"),
    Mutant("the wheel brings no configurations", "pyproject.toml", '"megatron_plugin.configs" = ["*.yaml", "*.md"]', '"megatron_plugin.configs" = ["*.md"]', f"{WHEEL} -k every_file"),
    Mutant("config init replaces what somebody has edited", "megatron_plugin/config/starters.py", "path.exists() and path.read_bytes() != text", "False", "tests/packaging/test_starters.py"),
    Mutant("a package that is imported is in no extra", "pyproject.toml", '"math-verify[antlr4-13-2]"', '"numpy"', f"{LOCKS} -k asked_for"),
    Mutant("the lock has another triton than torch", "requirements/py312-cuda13.txt", "\ntriton==3.7.1\n", "\ntriton==3.8.0\n", f"{LOCKS} -k fits_together"),
    Mutant("token_loss has no type", "megatron_plugin/ops/graph_break.py", "def graph_break(fn: F) -> F:", "def graph_break(fn):", f"{TYPES} -k program"),
    Mutant("a public name is unknown to type checkers", "megatron_plugin/__init__.py", "    from megatron_plugin.losses.binding import bind as bind\n", "", f"{TYPES} -k names"),
    Mutant("Markdown eats the brackets and stars of docstrings", "docs/pages.py", 'replace("<", "&lt;")', 'replace("[", "<")', f"{SITE} -k arrives"),
]
