"""Commands that the pages print: none is without a place where it is run, and each is understood as printed.  run.py runs them."""

import os
import re
import shlex
from pathlib import Path

import pytest

from megatron_plugin.cli.arguments import arranged
from megatron_plugin.cli.commands import parser
from megatron_plugin.config import load_config
from tests.walk.commands import ROOT, every_command
from tests.walk.run import ELSEWHERE, elsewhere

COMMANDS = every_command()
OURS = [c for c in COMMANDS if re.search(r"megatron-plugin |megatron_plugin\.cli ", c.text) and not c.text.startswith("pip ")]


def words_of(command) -> tuple[int, list[str]]:
    """(ranks, what our command line gets)."""
    words = shlex.split(command.text)
    ranks = 1
    for name in ("--nnodes", "--nproc-per-node"):
        ranks *= int(words[words.index(name) + 1]) if name in words else 1
    after = "megatron-plugin" if words[0] == "megatron-plugin" else "megatron_plugin.cli"
    return ranks, words[words.index(after) + 1 :]


def test_there_are_commands_and_every_exception_is_one():
    assert len(COMMANDS) > 30 and len({c.page for c in COMMANDS}) >= 6
    unused = [begin for begin in ELSEWHERE if not any(c.text.startswith(begin) for c in COMMANDS)]
    assert not unused, "excused, and printed nowhere"


@pytest.mark.parametrize("command", OURS, ids=str)
def test_it_is_understood_as_printed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    ranks, words = words_of(command)
    arguments = parser().parse_args(arranged(words))
    if words[0] == "train" and arguments.config.startswith("configs/"):
        load_config(arguments.config, arguments.overrides, world_size=None if "..." in command.text else ranks, smoke=arguments.smoke)
    assert arguments.run


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.text.startswith("make ")], ids=str)
def test_make_has_the_target(command):
    assert re.search(rf"^{command.text.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.text.startswith("python ") and " -c " not in c.text], ids=str)
def test_the_module_or_file_is_there(command):
    words = shlex.split(command.text.replace("<", "").replace(">", ""))
    name = words[2].replace(".", os.sep) + ".py" if words[1] == "-m" else words[1]
    assert (ROOT / name).is_file() or Path(ROOT / name.removesuffix(".py")).is_dir()


def test_what_is_run_elsewhere_is_there():
    for why in ELSEWHERE.values():
        for path in re.findall(r"(?:tests|docs|benchmarks)/[\w/]+(?:\.\w+)?", why):
            assert (ROOT / path).exists(), path
    assert any(not elsewhere(command) for command in COMMANDS)
