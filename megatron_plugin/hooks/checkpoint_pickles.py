"""What is pickled in megatron-core's checkpoints, looked at before megatron-core unpickles it.

Its torch_dist format has pickles in three places, and a pickle can run any code:

  .metadata       torch.distributed.checkpoint reads it with plain pickle.load
  __*_*.distcp    objects beside the tensors (`_extra_state` of linear layers): torch's load planner reads them with weights_only=False.
                  The tensors themselves it reads with weights_only=True
  common.pt       torch.load with torch's default, weights_only=True

Here all three are read with what only knows tensors, numbers, text, containers and the classes of the format.  What passes holds nothing else,
so that megatron-core may read the same bytes.  What Transformer Engine keeps of fp8 scales is bytes to it and to us, and a pickle to Transformer
Engine: not looked into.  Who can change the files in between is not kept out: a checkpoint's directory must not be
writable for others while a run starts.  Canaries: tests/hooks/test_checkpoint_pickles.py.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

__all__ = ["check_pickles"]

MODULES = {
    "torch.distributed.checkpoint.metadata": None,  # dataclasses and enums
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.serialization": {"_get_layout"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""Module -> the names that .metadata may ask for; None: classes defined there."""


def check_pickles(checkpoint: Path) -> None:
    """ValueError, naming the file, when something in `checkpoint` would have to be unpickled that is no part of the format."""
    path = checkpoint / ".metadata"
    if not path.exists():  # not torch_dist: megatron-core says what it thinks of it
        return
    try:
        metadata = _Restricted(io.BytesIO(path.read_bytes())).load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path}: got {type(metadata).__name__}, expected torch's Metadata")
    objects = {name for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)}
    for index, place in (metadata.storage_data or {}).items():
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{path}: got the file {place.relative_path}, expected one of this directory; nothing was loaded")
        if index.fqn in objects:
            _check(checkpoint / place.relative_path, place.offset, place.length)
    if (checkpoint / "common.pt").exists():
        _check(checkpoint / "common.pt", 0, -1)


class _Restricted(pickle.Unpickler):
    """Knows the classes of .metadata, and no function that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if module == "torch" and "." not in name:  # torch.float32, torch.Size, torch.strided
            found = getattr(torch, name, None)
            found = found if found is torch.Size or isinstance(found, (torch.dtype, torch.layout, torch.memory_format)) else None
        elif "." not in name and module in MODULES and (MODULES[module] is None or name in MODULES[module]):
            found = super().find_class(module, name)
            if MODULES[module] is None and getattr(found, "__module__", None) != module:  # something that the module has only imported
                found = None
        if found is None:
            raise ValueError(f".metadata asks for {module}.{name}, which is no part of megatron-core's format: it could run any code, so nothing was loaded; "
                             "use a checkpoint from a source you trust")  # fmt: skip
        return found


def _check(path: Path, offset: int, length: int) -> None:
    """Read one object as torch's safe loader does."""
    try:
        # Transformer Engine's _extra_state is bytes in a BytesIO, which megatron-core allows too (its safe_globals.py)
        with open(path, "rb") as file, torch.serialization.safe_globals([io.BytesIO]):
            file.seek(offset)
            torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: holds more than tensors and plain values ({str(error).splitlines()[0][:300]}), which could run any code, so nothing was "
                         "loaded; use a checkpoint from a source you trust") from error  # fmt: skip
