"""Weights through shared memory: raw bytes in a file of /dev/shm, for engines on the trainer's machine.

Each bucket is a new file, removed once every engine has loaded it.  It is not written over: vLLM keeps views of a layer's tensors until the layer's last
one has come, which may be in the next bucket (vllm/model_executor/model_loader/reload/layerwise.py, loaded_weights)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_plugin.rollout.engine import EngineError
from megatron_plugin.rollout.transports.bucket import Manifest

__all__ = ["PREFIX", "SharedMemory"]

PREFIX = "megatron-plugin-"


class SharedMemory:
    """`folder`: where the files go, /dev/shm by default; any folder that trainer and engines both see works, more slowly on a disk."""

    backend = "megatron_plugin_shm"

    def __init__(self, folder: str | os.PathLike = "/dev/shm"):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"got {str(folder)!r} for shared memory, expected a folder that trainer and engines see")
        self.path: Path | None = None
        self._file: Any = None
        _remove_left_behind(self.folder)

    def open(self, engine: Any) -> None:
        """Nothing to set up: a path is all an engine needs."""

    def start_bucket(self, size: int) -> None:
        """`size`: bytes it will hold at most."""
        self.end_bucket()
        self.path = self.folder / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        # readable by this user only, and never an existing file: the name of one could be guessed by nobody, a link not followed
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(handle, "wb", buffering=0)

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


def _remove_left_behind(folder: Path) -> None:
    """Buckets of trainers that were killed: they would hold memory until the machine restarts."""
    for path in folder.glob(f"{PREFIX}*"):
        owner = path.name.removeprefix(PREFIX).split("-")[0]
        try:
            if owner.isdigit() and path.stat().st_uid == os.getuid() and not Path(f"/proc/{owner}").exists():
                path.unlink()
        except OSError:  # removed by another process in the meantime
            pass
