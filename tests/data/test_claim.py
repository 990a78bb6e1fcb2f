"""A folder's results are of one thing."""

import hashlib
import json

import pytest

from megatron_plugin.data import DataError
from megatron_plugin.data.claim import claim, file_sha256


def test_the_same_may_go_on_and_nothing_else(tmp_path):
    note, wanted = tmp_path / "out" / "note.json", {"model": "é", "beta": 0.7, "ends": None}
    claim(note, wanted, kind="answers")
    assert json.loads(note.read_text("utf-8")) == wanted
    claim(note, dict(wanted), kind="answers")
    with pytest.raises(DataError, match=r"out: holds answers of something else \(beta is 3, was 0.7; new is 1, was None\)") as error:
        claim(note, {"model": "é", "beta": 3, "ends": None, "new": 1}, kind="answers")
    assert error.value.exit_code == 4 and json.loads(note.read_text("utf-8")) == wanted, "the note is left as it was"
    with pytest.raises(DataError, match=r"something else \(new is 1, was None\)"):
        claim(note, wanted | {"new": 1}, kind="answers")


def test_a_files_digest(tmp_path):
    (tmp_path / "x").write_bytes(b"x" * 3_000_000)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    with pytest.raises(DataError, match="cannot read the data: No such file or directory; expected a jsonl file"):
        file_sha256(tmp_path / "none")


def test_a_note_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "note.json").write_text("")
    with pytest.raises(DataError, match=r"note\.json: cannot read what its answers are of"):
        claim(tmp_path / "note.json", {"a": 1}, kind="answers")
