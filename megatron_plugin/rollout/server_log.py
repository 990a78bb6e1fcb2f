"""The log of a server that runs for weeks: it must not fill the disk, and the server, which only appends, need not know."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["cap_log"]

LOG_BYTES, KEPT_BYTES = 64 << 20, 1 << 20


def cap_log(path: Path) -> bool:
    """Empty a log of more than 64 MiB, whoever writes to it; whether it was.  Its last MiB goes to a file beside it, NAME.1, if the disk takes it."""
    if not path.is_file() or path.stat().st_size <= LOG_BYTES:
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:  # on a full disk it is the emptying that helps
        file.seek(-KEPT_BYTES, os.SEEK_END)
        path.with_name(f"{path.name}.1").write_bytes(file.read())
    os.truncate(path, 0)
    return True
