"""megatron-plugin config init."""

from pathlib import Path

import pytest

from megatron_plugin import cli
from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.starters import SHIPPED, write_starters

ROOT = Path(__file__).parents[2]


def test_the_shipped_configurations_are_those_of_the_checkout():
    assert SHIPPED.resolve() == ROOT / "configs"


def test_init_copies_them_and_again_changes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "init"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"configs/{path.name}" for path in sorted((ROOT / "configs").iterdir()) if path.suffix in (".yaml", ".md")] and len(said) > 8
    assert cli.main(["config", "init"]) == 0 and cli.main(["config", "init", "other/place"]) == 0
    assert (tmp_path / "other/place/dft.yaml").read_bytes() == (ROOT / "configs/dft.yaml").read_bytes()


def test_what_somebody_has_edited_stays(tmp_path, capsys):
    (tmp_path / "dft.yaml").write_text("mine")
    assert cli.main(["config", "init", str(tmp_path)]) == 2
    assert f"{tmp_path}: got a folder whose dft.yaml is not as shipped, expected a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dft.yaml"] and (tmp_path / "dft.yaml").read_text() == "mine"


def test_a_place_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write configurations there: .*; name a folder that can be written"):
        write_starters(tmp_path / "file" / "below")
