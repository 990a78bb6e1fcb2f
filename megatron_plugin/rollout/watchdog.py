"""No orphans: an engine's processes end when the process that started them is gone, however it went."""

from __future__ import annotations

import os
import signal
import threading
import time

__all__ = ["OWNER", "watch_parent"]

OWNER = "MEGATRON_PLUGIN_OWNER"
"""Environment variable: the process id of the trainer that owns the engine.  Without it nothing is watched."""
PERIOD_S = 0.5


def watch_parent() -> None:
    """Kill this process as soon as its parent or the owner is gone; a thread, and nothing where OWNER is not set.

    Each of vLLM's processes watches its own parent, so that they end one after the other, and Python's resource tracker behind them removes their shared
    memory.  (PR_SET_PDEATHSIG would not do: it fires when the thread that forked ends, and engines are restarted from threads.)"""
    owner = os.environ.get(OWNER)
    if owner and not any(thread.name == OWNER for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(os.getppid(), owner), name=OWNER, daemon=True).start()


def _watch(parent: int, owner: str) -> None:
    orphan = parent == 1 and owner != "1"  # the parent went while this process was still importing
    while not orphan and os.getppid() == parent and os.path.exists(f"/proc/{owner}"):
        time.sleep(PERIOD_S)
    os.kill(os.getpid(), signal.SIGKILL)
