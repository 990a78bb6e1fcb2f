"""Run a function on N gloo ranks.  The rank processes are started once per test session and reused: torch's import costs seconds.

    results = on_ranks(3, "tests.parallel.ranks", "logp_of_shard", V=5003)       # [result of rank 0, 1, 2]

The function takes (group, **arguments), lives in an importable module without tests and returns something picklable.
"""

import atexit
import gc
import importlib
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path

import torch.multiprocessing as mp

ROOT = str(Path(__file__).parent.parent)
WORLD = 4
TIMEOUT_S = 120
THREADS = 150  # of a rank: megatron-core's DistributedDataParallel is never freed, and keeps its gloo groups and their threads with it
_requests = count()


def _serve(rank: int, store: str, pipe) -> None:
    """A rank: answers requests until the pipe closes, each in a world of its own size."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # gloo ranks on the CPU, also on a GPU machine
    sys.path.append(ROOT)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_S)
    store = dist.FileStore(store)
    while True:
        try:
            request, size, module, function, arguments = pipe.recv()
        except EOFError:
            for child in mp.active_children():  # megatron-core's checkpoint writer leaves one
                child.terminate()
            os._exit(0)  # the session is over; leaving a process group whose peers are gone can hang
        # A fresh world for each request: megatron-core never destroys the groups it makes, and each keeps threads.
        # The old one goes here, where every rank has answered: a group destroyed while a peer still talks to it kills the peer.
        gc.collect()  # models in reference cycles keep their groups
        if dist.is_initialized():
            dist.destroy_process_group()
        threads = len(os.listdir("/proc/self/task"))
        dist.init_process_group("gloo", store=dist.PrefixStore(str(request), store), rank=rank, world_size=size, timeout=timeout)
        try:
            answer = True, getattr(importlib.import_module(module), function)(dist.group.WORLD, **arguments)
        except BaseException as error:
            answer = False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            dist.destroy_process_group()  # peers that wait for this rank fail at once instead of at their timeout
        pipe.send((*answer, threads))


@cache
def _pool():
    context = mp.get_context("spawn")
    store = tempfile.NamedTemporaryFile(delete=False, prefix="ranks").name
    os.unlink(store)
    pipes, processes = [], []
    for rank in range(WORLD):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(rank, store, theirs)))
        processes[-1].start()  # not a daemon: megatron-core's checkpoint writer has children
        theirs.close()
        pipes.append(ours)
    atexit.register(lambda: [pipe.close() for pipe in pipes])
    return pipes, processes


def on_ranks(size: int, module: str, function: str, **arguments) -> list:
    """Results of `function(group, **arguments)` on each rank of a world of `size`.  RuntimeError with the rank's traceback if one fails."""
    pipes, processes = _pool()
    pipes, request = pipes[:size], next(_requests)
    for pipe in pipes:
        pipe.send((request, size, module, function, arguments))
    answers = []
    for rank, pipe in enumerate(pipes):
        try:
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} of {size} did not finish {module}.{function} within {TIMEOUT_S} s")
            answers.append(pipe.recv())
        except (TimeoutError, EOFError) as error:
            processes[rank].join(5)
            died = f"rank {rank} of {size} died in {module}.{function}: exit code {processes[rank].exitcode}"
            for process in processes:  # a late answer must not be taken for that of the next question
                process.kill()
            _pool.cache_clear()
            raise error if isinstance(error, TimeoutError) else RuntimeError(died) from None
    if max(threads for *_, threads in answers) > THREADS:
        for pipe in _pool()[0]:
            pipe.close()  # the ranks end themselves; the next question starts new ones
        _pool.cache_clear()
    for rank, (ok, result, _) in enumerate(answers):
        if not ok:
            raise RuntimeError(f"rank {rank} of {size}: {result}")
    return [result for _, result, _ in answers]
