"""Weights between GPUs: as gloo.py, through an NCCL communicator made by vLLM's own rendezvous.  Never run: written from vLLM 0.32's source.

vLLM in the trainer's process is needed (rollout/vllm_plugin.py imports it), one GPU per rank, and a network that NCCL finds by itself.
vLLM's ipc backend is left out: over HTTP it needs pickle and VLLM_ALLOW_INSECURE_SERIALIZATION=1."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from megatron_plugin.rollout.transports.bucket import Manifest
from megatron_plugin.rollout.transports.gloo import MOST_CALLS, listen

__all__ = ["Nccl"]


class Nccl:
    """`bind`: the trainer's address for the rendezvous; loopback by default.  One group per engine, made for each update.  Never run."""

    backend = "megatron_plugin_nccl"

    def __init__(self, bind: str = "127.0.0.1", timeout_s: float = 120.0):
        listen(bind).close()
        self.bind = bind
        self.timeout_s = timeout_s
        self._groups: dict[int, Any] = {}
        self._pool = ThreadPoolExecutor(MOST_CALLS, thread_name_prefix="nccl")
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._size = 0

    def open(self, engine: Any) -> None:
        """A communicator with the workers of one engine."""
        from megatron_plugin.rollout.vllm_plugin import nccl_trainer_group

        with listen(self.bind) as probe:  # vLLM's rendezvous binds by itself, to the same address; this finds it a free port
            port = probe.getsockname()[1]
        world = 1 + engine.workers
        invitation = {"address": self.bind, "port": port, "world_size": world, "timeout_s": self.timeout_s}
        answer = self._pool.submit(engine.init_transfer, invitation)
        self._groups[id(engine)] = nccl_trainer_group(self.bind, port, world)
        answer.result()

    def start_bucket(self, size: int) -> None:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._size = 0

    def write(self, offset: int, data: Tensor) -> None:
        """[bytes] uint8 at `offset` of the bucket; from a GPU tensor without a detour over the host."""
        end = offset + data.numel()
        self._buffer[offset:end].copy_(data, non_blocking=True)
        self._size = max(self._size, end)

    def deliver(self, engine: Any, manifest: Manifest) -> None:
        answer = self._pool.submit(engine.push, vars(manifest))
        stream = torch.cuda.current_stream()
        self._groups[id(engine)].broadcast(self._buffer[: self._size], src=0, stream=stream)
        answer.result()
        stream.synchronize()

    def end_bucket(self) -> None:
        """The buffer is kept for the next bucket."""

    def drop(self, engine: Any) -> None:
        if group := self._groups.pop(id(engine), None):
            group.destroy()

    def close(self) -> None:
        for engine_id in list(self._groups):
            self._groups.pop(engine_id).destroy()
        self._pool.shutdown(wait=False)
