"""A folder's results are of one thing."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megatron_plugin.data import DataError
from megatron_plugin.data.claim import claim, file_sha256, weights_digest


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


def test_other_weights_have_another_digest(tmp_path):
    """Of one tensor among several, and of its shape alone; a copy, and a file beside them, change nothing."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(50, 400), "b": torch.randn(300, 1000)}
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text("{}")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("something")
    was = weights_digest(tmp_path / "one")
    assert weights_digest(tmp_path / "copy") == was
    save_file(tensors | {"a": tensors["a"].view(400, 50)}, tmp_path / "copy" / "model.safetensors")
    assert weights_digest(tmp_path / "copy") != was
    for name in tensors:  # a training step moves nearly every number
        save_file(tensors | {name: tensors[name] + 1e-3}, tmp_path / "copy" / "model.safetensors")
        assert weights_digest(tmp_path / "copy") != was, name
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "copy" / "model.safetensors")
    (tmp_path / "copy" / "config.json").write_text('{"rope_theta": 5}')
    assert weights_digest(tmp_path / "copy") != was


def test_a_checkpoint_is_known_by_its_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text('{"files": {"a": "1"}}')
    was = weights_digest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"files": {"a": "2"}}')
    assert weights_digest(tmp_path) != was
