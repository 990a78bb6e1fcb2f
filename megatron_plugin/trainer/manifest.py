"""What a checkpoint's files are: manifest.json names each with size and sha256, and is the last of them to be written.

    {"files": {"__0_0.distcp": {"bytes": 127548, "sha256": "..."}, ...}, "format": 2, "sha256": "<of the two before>"}
A manifest is read only in the very bytes that `write_manifest` makes, so that a change of itself is found too.  It finds damage, not malice:
who can change a file can change the manifest (hooks/checkpoint_pickles.py is about that).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

__all__ = ["FORMAT", "MANIFEST", "Damage", "NewerFormatError", "damage", "digest", "digests", "exchange", "sync_folder", "write_manifest", "write_text"]

FORMAT = 2
"""Of the directory; 1 had no manifest (tests/trainer/golden has one of it)."""
MANIFEST = "manifest.json"
BLOCK = 1 << 22
"""Bytes hashed at a time: a file of 100 GB must not be in memory."""


class NewerFormatError(ValueError):
    """A whole checkpoint of a version that this one does not know."""

    exit_code = 3


class Damage(NamedTuple):
    """Why a checkpoint cannot be used."""

    what: str
    """By file."""
    lasting: bool = True
    """False: it could not be read this time, and may be sound."""


def exchange(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def digest(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the manifest has them."""
    found, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
            size += len(block)
    return {"bytes": size, "sha256": found.hexdigest()}


def digests(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """By name, each file being on disk when this returns.  OSError."""
    for path in (paths := list(paths)):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # of the file, whoever wrote it
    return {path.name: digest(path) for path in paths}


def write_text(path: Path, text: str) -> None:
    """A file that is on disk, whole or not at all, under its name when this returns.  OSError."""
    writing = path.with_name(f".{path.name}.writing")
    with open(writing, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(writing, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Names that were made, moved or removed in a directory are on disk when this returns."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """After everything that it names is on disk."""
    write_text(folder / MANIFEST, _text(files))


def damage(folder: Path) -> Damage | None:
    """What is wrong with a checkpoint, by file; None for nothing.  Collective: the ranks share the files, so that each is read once.

    One of format 1 has no manifest; of it only the presence of the parts is known.  NewerFormatError: another version's may be sound."""
    problem, files = _read(folder) if dist.get_rank() == 0 else (None, {})
    problem, files = exchange((problem, files))[0]
    if isinstance(files, int):
        raise NewerFormatError(f"{folder / MANIFEST}: got format {files}, expected at most {FORMAT}: it was written by a newer version; use that one, "
                               "or start from another checkpoint or in another run_dir")  # fmt: skip
    if problem:
        return problem
    mine = _share(files, dist.get_rank(), dist.get_world_size())
    return next((found for found in exchange(_damaged(folder, mine)) if found), None)


def _text(files: Mapping[str, Mapping[str, Any]]) -> str:
    body = {"files": files, "format": FORMAT}
    return json.dumps(body | {"sha256": _hash(body)}, indent=1, sort_keys=True) + "\n"


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _is_newer(parsed: Any) -> bool:
    """Whether a whole manifest of a later format is meant, not this one's damaged: its hash is that of all the rest."""
    if not isinstance(parsed, dict) or not isinstance(parsed.get("format"), int) or parsed["format"] <= FORMAT:
        return False
    return parsed.get("sha256") == _hash({name: value for name, value in parsed.items() if name != "sha256"})


def _read(folder: Path) -> tuple[Damage | None, dict[str, dict[str, Any]] | int]:
    """(what is wrong with the manifest, what it says; of a newer one the number of its format)."""
    path = folder / MANIFEST
    try:
        if not path.exists():
            return _without_manifest(folder), {}
        text = path.read_text(encoding="utf-8")
        parsed = json.loads(text)
        if _is_newer(parsed):
            return None, parsed["format"]
        files = parsed["files"]
        if text != _text(files) or any(Path(name).name != name for name in files):
            return Damage(f"{path}: is not as it was written"), {}
        return None, files
    except OSError as error:
        return Damage(f"{path}: cannot be read ({error.strerror})", lasting=False), {}
    except Exception as error:  # whatever stands there; the other ranks wait for a verdict
        return Damage(f"{path}: cannot be read ({type(error).__name__}: {error})"), {}


def _without_manifest(folder: Path) -> Damage | None:
    """For a checkpoint of format 1, which had none: its parts, and that it is one."""
    state = folder / "train_state.json"
    for part in (state, folder / "metadata.json", folder / ".metadata", folder / "common.pt"):
        if not part.is_file():
            return Damage(f"{part}: is not there")
    written = json.loads(state.read_text(encoding="utf-8")).get("format", 1)
    return None if written == 1 else Damage(f"{folder / MANIFEST}: is not there")


def _share(files: Mapping[str, Mapping[str, Any]], rank: int, ranks: int) -> dict[str, Mapping[str, Any]]:
    """This rank's files: the largest first, each to the rank with the fewest bytes."""
    load, mine = [0] * ranks, {}
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = load.index(min(load))
        load[least] += files[name]["bytes"] + 1  # empty files are shared out too
        if least == rank:
            mine[name] = files[name]
    return mine


def _damaged(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Damage | None:
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return Damage(f"{path}: got {size} bytes, expected {expected['bytes']}")
            if digest(path) != expected:
                return Damage(f"{path}: its sha256 is not that of {MANIFEST}")
        except OSError as error:
            return Damage(f"{path}: cannot be read ({error.strerror})", lasting=isinstance(error, FileNotFoundError))
    return None
