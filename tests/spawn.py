"""Run a function on N gloo ranks.  The rank processes are started once per test session and reused: torch's import costs seconds.

    results = on_ranks(3, "tests.parallel.ranks", "logp_of_shard", V=5003)       # [result of rank 0, 1, 2]
    results = on_world(2, "tests.trainer.ranks", "train", ...)                  # the same where the whole world must be 2 ranks

The function takes (group, **arguments), lives in an importable module without tests and returns something picklable.
"""

import atexit
import importlib
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch.multiprocessing as mp

ROOT = str(Path(__file__).parent.parent)
WORLD = 4
TIMEOUT_S = 120


def _serve(rank: int, world: int, store: str, pipe) -> None:
    """A rank: joins the world, then answers requests until the pipe closes."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # gloo ranks on the CPU, also on a GPU machine
    sys.path.append(ROOT)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S))
    groups = {n: dist.new_group(list(range(n)), timeout=timedelta(seconds=TIMEOUT_S)) for n in range(1, world + 1)}
    while True:
        try:
            size, module, function, arguments = pipe.recv()
        except EOFError:
            for child in mp.active_children():  # megatron-core's checkpoint writer leaves one
                child.terminate()
            os._exit(0)  # the session is over; leaving a process group whose peers are gone can hang
        try:
            pipe.send((True, getattr(importlib.import_module(module), function)(groups[size], **arguments)))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


@cache
def _pool(world: int):
    context = mp.get_context("spawn")
    store = tempfile.NamedTemporaryFile(delete=False, prefix="ranks").name
    os.unlink(store)
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(rank, world, store, theirs)))
        processes[-1].start()  # not a daemon: megatron-core's checkpoint writer has children
        theirs.close()
        pipes.append(ours)
    atexit.register(lambda: [pipe.close() for pipe in pipes])
    return pipes, processes


def on_ranks(size: int, module: str, function: str, **arguments) -> list:
    """Results of `function(group, **arguments)` on ranks 0..size-1 of a world of four.  RuntimeError with the rank's traceback if one fails."""
    return _ask(WORLD, size, module, function, arguments)


def on_world(size: int, module: str, function: str, **arguments) -> list:
    """The same in a world of exactly `size` ranks, for code that uses the default process group."""
    return _ask(size, size, module, function, arguments)


def _ask(world: int, size: int, module: str, function: str, arguments: dict) -> list:
    pipes, processes = _pool(world)
    pipes = pipes[:size]
    for pipe in pipes:
        pipe.send((size, module, function, arguments))
    answers = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(TIMEOUT_S):
            for process in processes:  # a late answer must not be taken for that of the next question
                process.kill()
            _pool.cache_clear()
            raise TimeoutError(f"rank {rank} of {size} did not finish {module}.{function} within {TIMEOUT_S} s")
        answers.append(pipe.recv())
    for rank, (ok, result) in enumerate(answers):
        if not ok:
            raise RuntimeError(f"rank {rank} of {size}: {result}")
    return [result for _, result in answers]
