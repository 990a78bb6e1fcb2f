"""Runs a script of examples/ on ranks that are there already (tests/spawn.py): every torchrun imports torch, and megatron-core, anew on each rank."""

import contextlib
import io
import os
import runpy
import socket
import sys

import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_example(group, *, path: str, arguments: list[str], port: int) -> str:
    """What this rank prints, with the environment that torchrun would give it."""
    rank, size = group.rank(), group.size()
    dist.barrier(group)
    dist.destroy_process_group()  # the script makes its own
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before, words, said = dict(os.environ), sys.argv, io.StringIO()
    os.environ |= {name: str(value) for name, value in ours.items()}
    sys.argv = [path, *arguments]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = words
        os.environ.clear()
        os.environ |= before
        if "megatron.core" in sys.modules:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
    return said.getvalue()
