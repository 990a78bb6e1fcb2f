"""SIGTERM and Ctrl-C while a run trains: remembered by the rank that gets one, agreed by all, obeyed where nothing is half done.

    with caught():                              # from here on a signal ends no process
        votes[3] = asked()                      # agreed in the vote of every step (trainer/guard.py) ...
        leave_if_asked()                        # ... and in what is longer than a step; LeaveError on every rank, or none
        leaders.on_leaders(breakable(act))      # a leader's wait is broken off at once, and the leaders tell the others

A rank inside a collective runs no Python, so also no handler, until the collective is over.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_plugin.hooks.mcore import device

__all__ = ["LeaveError", "StoppedError", "agreed", "asked", "breakable", "breaking", "caught", "leave_if_asked", "stopped"]

T = TypeVar("T")
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
ONE_CTRL_C_S = 1.0  # a terminal and torchrun may both pass one Ctrl-C on; a later second one is a person who does not want to wait

_asked = 0
_breaking = False


class LeaveError(Exception):
    """A signal ended something that can be given up: an evaluation, a rollout.  Raised on every rank, except inside `breaking`."""

    exit_code = 143


class StoppedError(Exception):
    """The run ended because a signal asked for it; its text says what is saved."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def asked() -> int:
    """The number of the signal that this rank has got; 0: none."""
    return _asked


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT are remembered; a second Ctrl-C, a second after the first, is a KeyboardInterrupt.  Main thread only: elsewhere
    Python has no handlers to set."""
    global _asked, _breaking
    _asked, _breaking = 0, False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _remember) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_since = 0.0


def _remember(number: int, frame) -> None:
    global _asked, _since
    if number == signal.SIGINT and _asked and time.monotonic() - _since > ONE_CTRL_C_S:
        raise KeyboardInterrupt
    first = not _asked
    if first:
        _since = time.monotonic()
    _asked = max(_asked, number)  # all ranks end with one exit code: SIGTERM's where some got a Ctrl-C
    if _breaking and first:  # one is enough, and `_breaking` may be left over where it came on the way out of `breaking`
        raise LeaveError("a signal came")


@contextlib.contextmanager
def breaking() -> Iterator[None]:
    """Inside, a signal raises LeaveError at once, on this rank alone; also one that came before."""
    global _breaking
    try:
        _breaking = True
        if _asked:
            raise LeaveError("a signal came")
        yield
    finally:
        _breaking = False


def breakable(act: Callable[[], T]) -> Callable[[], T]:
    """`act`, broken off by a signal; for Leaders.on_leaders, which lets every rank raise."""

    def run() -> T:
        with breaking():
            return act()

    return run


def leave_if_asked() -> None:
    """Collective: LeaveError on every rank as soon as one of them was asked.  One all-reduce and one host sync: not for every step."""
    if agreed():
        raise LeaveError("a signal came")


def agreed() -> int:
    """Collective: the signal that any rank has got, on every rank; 0: none."""
    value = torch.tensor(float(_asked), device=device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def stopped(number: int, message: str) -> StoppedError:
    """The error to leave the run with after signal `number`."""
    return StoppedError(f"stopped by {signal.Signals(number).name}: {message}", EXIT_CODES.get(signal.Signals(number), 143))
