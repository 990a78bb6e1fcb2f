"""What the commands have in common: a parser that raises, types of arguments, and what is done before megatron-core is imported."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_plugin.cli.spawned import end_with_parent

__all__ = ["Parser", "UsageError", "add_config", "arranged", "before_megatron", "count", "existing_file", "int_variable", "whole"]

USAGE_ERROR = 2


class UsageError(Exception):
    """The command line does not parse."""

    exit_code = USAGE_ERROR


class Parser(argparse.ArgumentParser):
    """argparse that raises, so that a usage error under torchrun is printed by one rank like every other, and takes no abbreviations: an option
    that comes later could make one of them mean something else."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        _, stray, rest = message.partition("unrecognized arguments: ")
        hint = "; overrides are written key=value without dashes, such as train.steps=20" if rest.startswith("-") else ""
        if stray and "=" in rest and not hint:  # argparse takes all positional arguments in one go
            hint = "; overrides stand together, before or behind all options"
        raise UsageError(f"{message}{hint}\n{self.format_usage().rstrip()}")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 0")
    return int(text)


def existing_file(name: str, what: str) -> Path:
    """The path of a file; DataPathError, exit code 4, where there is none.  `what` is expected, in words."""
    if not Path(name).is_file():
        from megatron_plugin.config import DataPathError

        raise DataPathError(f"got {name!r}, expected {what} that exists, relative to {Path.cwd()}")
    return Path(name)


def before_megatron() -> None:
    """Ties this rank to its torchrun, looks for packages that make importing megatron.core impossible, and quiets it: without Transformer Engine
    and apex it says so in a dozen warnings per rank, on every start."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from megatron_plugin.hooks.accelerators import check_accelerators

    for line in check_accelerators():
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-plugin: {line}", file=sys.stderr)


def int_variable(name: str, default: int) -> int:
    value = os.environ.get(name, "") or str(default)
    if not value.isdecimal():
        raise UsageError(f"environment variable {name}: got {value!r}, expected a whole number (torchrun sets it)")
    return int(value)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that takes a configuration: the file, overrides, --smoke."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/dft.yaml")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="dotted keys that replace values of the file: train.steps=20; also Megatron's "
                        "names for them: tensor_model_parallel_size=2, --tensor-model-parallel-size 2")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="a tiny model on embedded problems for a few steps, in <run_dir>-smoke, made anew each "
                        "time; what it changes is printed, and an override goes over it")  # fmt: skip


def arranged(words: Sequence[str]) -> list[str]:
    """The command line with Megatron's flags written as overrides, and with all overrides directly behind the file, where argparse wants them.

    Of the commands that take a configuration; others come back as they are."""
    words = list(words)
    if words[:1] != ["train"] and words[:2] != ["config", "show"]:
        return words
    rest, overrides = [], []
    while words:
        word = words.pop(0)
        if word.startswith("--") and (name := _megatron_name(word)):
            overrides.append(_as_override(name, word, words))
        elif "=" in word and not word.startswith("-"):
            overrides.append(word)
        else:
            rest.append(word)
    return sorted([*rest, *overrides], key=lambda word: word.startswith("-"))  # options last, all else in its order


def _megatron_name(flag: str) -> str:
    """The name of a flag that Megatron has, with underscores; "" for any other, and for our own."""
    name = flag[2:].partition("=")[0].replace("-", "_")
    if name in ("smoke", "help") or "." in name:
        return ""
    from megatron_plugin.config.aliases import ALIASES, HINTS
    from megatron_plugin.config.megatron_fields import model_fields

    if name in ALIASES or name in HINTS or name in model_fields():
        return name
    if near := difflib.get_close_matches(name, ALIASES, n=1, cutoff=0.8):
        raise UsageError(f"got {flag}, which is no option; did you mean --{near[0].replace('_', '-')}?")
    return ""


def _as_override(name: str, flag: str, following: list[str]) -> str:
    """name=value, its value taken from the flag or from the word behind it; of a switch, that word only where it is true or false."""
    from megatron_plugin.config.aliases import HINTS, flag_takes_value

    _, equals, value = flag.partition("=")
    if name in HINTS:  # refused here: whether it takes the word behind it is not known
        raise UsageError(f"got {flag}, Megatron's own name, expected ours: use '{HINTS[name]}'")
    if equals:
        return f"{name}={value}"
    if not flag_takes_value(name):
        return f"{name}={following.pop(0) if following[:1] in (['true'], ['false']) else 'true'}"
    if not following or following[0].startswith("--"):
        raise UsageError(f"got {flag} without a value, expected one behind it")
    return f"{name}={following.pop(0)}"
