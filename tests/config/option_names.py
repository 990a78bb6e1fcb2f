"""Names of options that peers really have, read from their packages: writes option_names.json, which the tests compare our tables with.

    python -m tests.config.option_names          # needs the wheels of tests/wheels.py, which it fetches

Kept are only names that docs/options.md or config/aliases.py mention and that are real; a name that is not is missing from the file, and a test fails.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from megatron_plugin.config.aliases import ALIASES, HINTS
from tests.wheels import VERL, fetch_megatron, fetch_packages

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).parent / "option_names.json"
PAGE = ROOT / "docs/options.md"
MEGATRON, SWIFT = "0.19.2", "ms-swift==4.6.0"
PEERS = ("Megatron-LM", "verl", "TRL", "ms-swift")
"""Columns of the page, in order; ours is the first one."""


def page_rows() -> list[list[list[str]]]:
    """Cells of every row of the page's tables, each as the names in backticks that it holds: ours, then one for each peer."""
    rows = []
    for line in PAGE.read_text().splitlines():
        cells = [re.findall(r"`([^`]+)`", cell) for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 1 + len(PEERS) and any(cells):
            rows.append(cells)
    return rows


def megatron_names() -> tuple[set[str], set[str]]:
    """(names of Megatron-LM's command line, those that take no value)."""
    folder = fetch_megatron(MEGATRON)
    text = (folder / "megatron/training/arguments.py").read_text()
    added = re.findall(r"add_argument\(\s*'--([\w-]+)'((?:[^()]|\([^()]*\))*)\)", text)
    names = {name.replace("-", "_") for name, _ in added}
    switches = {name.replace("-", "_") for name, rest in added if "store_true" in rest or "store_false" in rest}
    configs = [*(folder / "megatron/training/config").glob("*.py"), folder / "megatron/core/transformer/transformer_config.py",
               folder / "megatron/core/model_parallel_config.py", folder / "megatron/core/optimizer/optimizer_config.py"]  # fmt: skip
    fields = _fields(configs)
    renamed = {name for file in configs for names in re.findall(r'"arg_names": \[([^\]]*)\]', file.read_text()) for name in re.findall(r"--([\w-]+)", names)}
    renamed = {name.replace("-", "_") for name in renamed}
    return names | set(fields) | renamed, switches | {name for name, kind in fields.items() if kind == "bool"} | {n for n in renamed if n.startswith("disable_")}


def verl_names() -> set[str]:
    """Dotted keys of its trainers' resolved configurations."""
    folder = fetch_packages(*VERL) / "verl/trainer/config"
    found: set[str] = set()
    for file in (*folder.glob("_generated_*.yaml"), folder / "sft_trainer_engine.yaml"):
        found |= set(_dotted(yaml.safe_load(file.read_text())))
    return found | {name.removeprefix("actor_rollout_ref.") for name in found}  # as the page writes them


def trl_names() -> set[str]:
    """Fields of the configurations of the installed TRL."""
    from trl import GRPOConfig, SFTConfig

    return {*SFTConfig.__dataclass_fields__, *GRPOConfig.__dataclass_fields__}


def swift_names() -> set[str]:
    """Fields of its argument classes, Megatron's among them."""
    folder = fetch_packages(SWIFT) / "swift"
    places = ("arguments", "megatron/arguments", "trainers", "rlhf_trainers")
    from transformers import TrainingArguments  # its classes add to these

    return {*_fields(file for place in places for file in (folder / place).rglob("*arg*.py")), *TrainingArguments.__dataclass_fields__}


def _fields(files: Iterable[Path]) -> dict[str, str]:
    """{name: annotation} of what classes in these files declare."""
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
                found |= {item.target.id: ast.unparse(item.annotation) for item in fields}
    return found


def _dotted(values: dict, prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def main() -> None:
    from importlib.metadata import version

    megatron, switches = megatron_names()
    real = {"Megatron-LM": megatron, "verl": verl_names(), "TRL": trl_names(), "ms-swift": swift_names()}
    versions = dict(zip(PEERS, (f"megatron-core {MEGATRON}", VERL[0], f"trl {version('trl')}", SWIFT), strict=True))
    document = {}
    for place, peer in enumerate(PEERS, 1):
        mentioned = {name for row in page_rows() for name in row[place]}
        mentioned |= {*ALIASES, *HINTS} if peer == "Megatron-LM" else set()
        document[peer] = {"version": versions[peer], "names": sorted(mentioned & real[peer])}
        for name in sorted(mentioned - real[peer]):
            print(f"{peer} has no {name}")
    document["Megatron-LM"]["switches"] = sorted(switches & set(ALIASES))
    FILE.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
