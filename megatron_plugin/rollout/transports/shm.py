"""Weights through shared memory: raw bytes in a file of /dev/shm, for engines on the trainer's machine.

Each bucket is a new file, removed once every engine has loaded it.  It is not written over: vLLM keeps views of a layer's tensors until the layer's last
one has come, which may be in the next bucket (vllm/model_executor/model_loader/reload/layerwise.py, loaded_weights)."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_plugin.rollout.engine import EngineError
from megatron_plugin.rollout.transports.bucket import Manifest

__all__ = ["PREFIX", "SharedMemory", "received", "shared_folder"]

PREFIX = "megatron-plugin-"


def shared_folder() -> Path:
    """/dev/shm, or MEGATRON_PLUGIN_SHM of the environment, which trainer and engines must have alike."""
    return Path(os.environ.get("MEGATRON_PLUGIN_SHM") or "/dev/shm")


class SharedMemory:
    """`folder`: where the files go, shared_folder() by default.  Engines read from their own shared_folder() only; any folder that both
    see works, more slowly on a disk."""

    backend = "megatron_plugin_shm"

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder or shared_folder())
        if not self.folder.is_dir():
            raise ValueError(f"got {str(self.folder)!r} for shared memory, expected a folder that trainer and engines see")
        self.path: Path | None = None
        self._file: Any = None
        _remove_left_behind(self.folder)

    def open(self, engine: Any) -> None:
        """Nothing to set up: a path is all an engine needs."""

    def start_bucket(self, size: int) -> None:
        """`size`: bytes it will hold at most."""
        self.end_bucket()
        while self._file is None:
            self.path = self.folder / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
            # readable by this user only, and never an existing file: the name of one could be guessed by nobody, a link not followed
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            file = os.fdopen(handle, "wb", buffering=0)
            fcntl.flock(handle, fcntl.LOCK_EX)  # our sign of life, as long as the file is open
            if os.fstat(handle).st_nlink:  # else removed in between, by _remove_left_behind of another trainer
                self._file = file
            else:
                file.close()

    def write(self, offset: int, data: Tensor) -> None:
        """[bytes] uint8, at `offset` of the bucket.  By write, not through a mapping: that takes a page fault per 4 KiB."""
        view, done = memoryview(data.cpu().numpy()), 0
        try:
            while done < len(view):  # one write moves 2 GiB at most
                done += os.pwrite(self._file.fileno(), view[done:], offset + done)
        except OSError as error:
            raise EngineError(
                f"{self.folder}: got no room for {offset + len(view)} bytes of weights ({error}): lower rollout.bucket_mb, or give another folder"
            ) from error

    def deliver(self, engine: Any, manifest: Manifest) -> None:
        """Let one engine load the bucket.  Called for several engines at once."""
        engine.push({**vars(manifest), "path": str(self.path)})

    def end_bucket(self) -> None:
        """Remove the file; engines that still read from it keep its memory until they are done."""
        if self._file is not None:
            self._file.close()
            self.path.unlink(missing_ok=True)
        self._file = self.path = None

    def drop(self, engine: Any) -> None:
        """Nothing is kept of an engine."""

    def close(self) -> None:
        self.end_bucket()


def received(path: str, size: int) -> Tensor:
    """In an engine: the bucket in the file at `path`, [size] uint8, a private mapping, valid after the file was removed.

    ValueError for any path but one of a regular file of this size, called PREFIX..., in shared_folder() itself: whoever reaches the engine's
    port names the path."""
    folder, given = shared_folder(), Path(path)
    if not given.name.startswith(PREFIX) or given.is_symlink() or given.parent.resolve() != folder.resolve():
        raise ValueError(f"got {path!r}, expected a file of weights called {folder}/{PREFIX}...")
    try:
        handle = os.open(folder.resolve() / given.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: got no such file, expected the trainer's shared memory: it reaches engines on its own machine; take gloo for others"
        ) from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: got no file, expected one of weights")
        if found.st_size != size:
            raise ValueError(f"{path}: got {found.st_size} bytes, expected {size}")
        # private only so that no right to write to the file is needed: nothing is written, so no page is copied
        return torch.frombuffer(mmap.mmap(handle, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8)
    finally:
        os.close(handle)


def _remove_left_behind(folder: Path) -> None:
    """Buckets of trainers that were killed: they would hold memory until the machine restarts.  A living one holds a lock on its file; its
    process id says nothing where containers share the folder and not the ids."""
    for path in folder.glob(f"{PREFIX}*"):
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # removed by another process in the meantime, another user's, a link or a folder
            continue
        try:
            found = os.fstat(handle)
            if found.st_uid == os.getuid() and stat.S_ISREG(found.st_mode):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # locked, so its trainer lives; or removed
            pass
        finally:
            os.close(handle)
