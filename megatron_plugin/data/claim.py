"""What the results in a folder are of: a command that goes on where it was must not go on with something else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_plugin.data.errors import DataError

__all__ = ["claim", "file_sha256", "weights_digest"]

PLACES, LENGTH = 1024, 1024  # of each file: after one training step nearly every one of them reads otherwise


def claim(note: str | Path, wanted: Mapping[str, Any], *, kind: str) -> None:
    """Write `wanted`, plain JSON values, into `note`, whose folder is made; or see that it says the same already.

    DataError when it says something else.  kind: what the folder holds, for the message."""
    note = Path(note)
    note.parent.mkdir(parents=True, exist_ok=True)
    try:
        there = json.loads(note.read_text("utf-8")) if note.is_file() else None
    except ValueError as error:
        raise DataError(f"cannot read what its {kind} are of ({error}): choose another --out, or remove it", str(note)) from error
    if there is None:
        writing = note.with_name(f".{note.name}.writing")
        writing.write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")
        os.replace(writing, note)
        return
    if there != wanted:
        keys = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
        what = "; ".join(f"{key} is {wanted.get(key)}, was {there.get(key)}" for key in keys)
        raise DataError(f"holds {kind} of something else ({what}): choose another --out, or remove it", str(note.parent))


def file_sha256(path: str | Path) -> str:
    """Hexadecimal.  DataError for a file that cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read the data: {error.strerror}; expected a jsonl file", str(path)) from error
    return digest.hexdigest()


def weights_digest(model: str | Path) -> str:
    """Tells one state of a model directory from another: hexadecimal, of its manifest.json (hashes of every byte), or else of the length of each
    file of weights, its first 64 KiB (the names and shapes in safetensors), and 1024 pieces of it, evenly spaced.  A copy elsewhere has the same.

    Not against somebody who means to deceive: a single number can be changed between the pieces."""
    model = Path(model)
    digest = hashlib.sha256()
    if (manifest := model / "manifest.json").is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin"), *model.glob("config.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 16))
            for place in range(PLACES):
                file.seek(size * place // PLACES)
                digest.update(file.read(LENGTH))
    return digest.hexdigest()
