"""No payload in a checkpoint is executed, wherever megatron-core keeps a pickle; and what it writes itself passes."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_plugin.hooks.checkpoint_pickles import check_pickles

GOLDEN = Path(__file__).parents[1] / "trainer/golden/checkpoints/step_00000002"


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.fixture
def checkpoint(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "step_00000002")
    return tmp_path / "step_00000002"


def metadata_of(checkpoint):
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def refuse(checkpoint, canary, name):
    with pytest.raises(ValueError, match="could run any code|no part of megatron-core's format") as raised:
        check_pickles(checkpoint)
    assert name in str(raised.value) and not canary.exists(), "the payload ran"


def test_what_megatron_core_writes_passes(checkpoint):
    check_pickles(checkpoint)


def test_a_payload_in_the_metadata(checkpoint, tmp_path):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    refuse(checkpoint, tmp_path / "canary", ".metadata")


def test_a_payload_among_the_fields_of_good_metadata(checkpoint, tmp_path):
    metadata = metadata_of(checkpoint)
    metadata.planner_data = {"x": Payload(tmp_path / "canary")}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(checkpoint, tmp_path / "canary", ".metadata asks for")


@pytest.mark.parametrize("module, name", [("builtins", "eval"), ("os", "system"), ("torch.distributed.checkpoint.metadata", "os.system"),
                                          ("torch.distributed.checkpoint.metadata", "dataclass"), ("torch", "load"), ("torch", "hub.load"),
                                          ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__")])  # fmt: skip
def test_functions_are_not_found_under_other_names(module, name, checkpoint):
    """As a pickle of protocol 4 asks: module and name are two strings."""
    call = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93."
    (checkpoint / ".metadata").write_bytes(call)
    with pytest.raises(ValueError, match="no part of megatron-core's format"):
        check_pickles(checkpoint)


def test_a_payload_in_an_object_beside_the_tensors(checkpoint, tmp_path):
    """The one place that torch itself reads with weights_only=False."""
    metadata = metadata_of(checkpoint)
    name = next(name for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata))
    index = next(index for index in metadata.storage_data if index.fqn == name)
    payload = io.BytesIO()
    torch.save([Payload(tmp_path / "canary")], payload)
    path = checkpoint / metadata.storage_data[index].relative_path
    metadata.storage_data[index].offset, metadata.storage_data[index].length = path.stat().st_size, len(payload.getvalue())
    path.write_bytes(path.read_bytes() + payload.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(checkpoint, tmp_path / "canary", path.name)


def test_bytes_are_a_plain_value(checkpoint):
    """Transformer Engine's state of a layer."""
    torch.save({"a": io.BytesIO(b"scales")}, checkpoint / "common.pt")
    check_pickles(checkpoint)


def test_a_payload_in_the_common_part(checkpoint, tmp_path):
    torch.save({"optimizer": Payload(tmp_path / "canary")}, checkpoint / "common.pt")
    refuse(checkpoint, tmp_path / "canary", "common.pt")


def test_files_of_other_directories_are_not_read(checkpoint):
    metadata = metadata_of(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = "../../etc/passwd"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="expected one of this directory"):
        check_pickles(checkpoint)
