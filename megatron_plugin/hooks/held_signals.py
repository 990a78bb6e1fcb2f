"""Processes started here are deaf to SIGTERM and SIGINT."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

__all__ = ["signals_held"]


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Inside, both signals wait in this thread, and processes that it starts inherit that for good, also through exec.

    torchrun sends SIGTERM to the whole process group of a rank (subprocess_handler.close, os.killpg): megatron-core's writers, and the queue between them
    that lives as long as the rank, would die of it first, and the checkpoint to be saved last with them (measured: [Errno 32] Broken pipe)."""
    resource_tracker.ensure_running()  # Python's spawn starts it where it is not there, and unblocks both signals behind it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
