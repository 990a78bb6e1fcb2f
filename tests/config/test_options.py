"""docs/options.md: every name in it is real, on our side against the schema, on the peers' against their packages."""

import json
from pathlib import Path

import pytest

from megatron_plugin.config.aliases import ALIASES
from megatron_plugin.config.keys import key_types
from megatron_plugin.config.loss_fields import loss_fields, regularisers
from tests.config.option_names import PAGE, PEERS, page_rows

FROZEN = json.loads((Path(__file__).parent / "option_names.json").read_text())
ROWS = page_rows()


def test_the_page_has_rows_and_each_has_one_key_of_ours():
    assert len(ROWS) > 60 and all(len(row[0]) == 1 for row in ROWS)
    assert len({row[0][0] for row in ROWS}) == len(ROWS), "each key once"


@pytest.mark.parametrize("key", [row[0][0] for row in ROWS])
def test_our_column_is_the_schema(key):
    section, _, name = key.partition(".")
    if section == "loss" and name != "name":
        assert name in regularisers() or any(name in takes for takes in loss_fields().values())
    else:
        assert key in key_types() or key == "loss.name"


@pytest.mark.parametrize("peer", PEERS)
def test_a_peers_column_is_what_its_package_has(peer):
    """The names that option_names.py found in the package; it is of the version that the page names."""
    place = 1 + PEERS.index(peer)
    mentioned = {name for row in ROWS for name in row[place]}
    assert mentioned and not mentioned - set(FROZEN[peer]["names"])
    number = FROZEN[peer]["version"].replace("==", " ").split()[-1]
    assert number in PAGE.read_text().split("##")[0], "the page names another version"


def test_trls_column_is_the_installed_trls():
    pytest.importorskip("trl")
    from tests.config.option_names import trl_names

    assert not {name for row in ROWS for name in row[1 + PEERS.index("TRL")]} - trl_names()


def test_aliases_and_the_page_say_the_same():
    """Where Megatron-LM's column has an alias, it is of the key in that row."""
    for row in ROWS:
        for name in row[1]:
            if name in ALIASES and not (name == "save" and row[0][0] == "checkpoint.resume"):
                assert ALIASES[name].key == row[0][0], name
