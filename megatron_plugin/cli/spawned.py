"""A process ends with the one that started it, also where that is killed: nothing tells it then.

A rank, in a session of its own, would go on training without its torchrun (seen with kill -9); a process that a library spawns (megatron-core, to
pass checkpoint results), which imports the command as __mp_main__, would wait for ever."""

from __future__ import annotations

import os
import sys
import threading

__all__ = ["end_with_parent", "is_spawned"]

PERIOD_S = 0.5


def is_spawned() -> bool:
    """Whether multiprocessing started this process.  (pytest-xdist's workers have a module of that name too.)"""
    if "__mp_main__" not in sys.modules:
        return False
    import multiprocessing

    return multiprocessing.current_process().name != "MainProcess"


def end_with_parent() -> None:
    """End this process, from a thread, as soon as its parent is gone."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="end with parent", daemon=True).start()


def _watch(parent: int) -> None:
    never = threading.Event()
    while os.getppid() == parent:
        never.wait(PERIOD_S)
    os._exit(0)
