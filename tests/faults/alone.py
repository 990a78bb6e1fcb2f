"""A function of a `*_ranks` module in a process of its own, a world of one rank: for what takes longer than tests/spawn.py waits."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any


class One:
    """The group that such a function is given."""

    @staticmethod
    def size() -> int:
        return 1


def alone(module: str, function: str, *, timeout_s: float, **arguments: Any) -> Any:
    """What `function(group, **arguments)` returns; its exception; TimeoutError."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        try:
            return pool.submit(_call, module, function, arguments).result(timeout_s)
        except TimeoutError:
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _one_thread() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)


def _call(module: str, function: str, arguments: dict[str, Any]) -> Any:
    return getattr(importlib.import_module(module), function)(One(), **arguments)
