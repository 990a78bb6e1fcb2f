"""Weights over the network between CPUs: the trainer broadcasts each bucket to one engine's workers, in a gloo group outside of the default one.

One group per engine, made for each update: an engine that dies breaks its own group only, and one that was restarted needs no special case.
(The price: with E engines the trainer's network card sends every byte E times.)"""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.rollout.engine import EngineLostError
from megatron_plugin.rollout.transports.bucket import Manifest

__all__ = ["Gloo", "broadcast", "join", "listen"]

GROUP = "megatron_plugin"
MOST_CALLS = 256  # engines at once
MEET_S = 30.0  # for an engine's workers to join
GRACE_S = 5.0  # for the answer of an engine whose connection broke


def listen(address: str) -> socket.socket:
    """A socket that listens on `address` only, at a free port (torch's TCPStore by itself listens on every interface).  ValueError for an
    address that is not one of this machine's, or that means all of them: engines are told to connect to it."""
    if address in ("", "0.0.0.0", "::"):
        raise ValueError(f"got {address!r} to listen on for weight transfer, expected one address of this machine that the engines can reach")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((address, 0))
    except OSError as error:
        listener.close()
        raise ValueError(f"got {address!r} to listen on for weight transfer, expected an address of this machine: {error}") from error
    listener.listen()
    return listener


def join(store: dist.Store, rank: int, world: int, address: str, timeout: timedelta) -> dist.ProcessGroupGloo:
    """A gloo group that neither needs nor touches the default process group; this rank listens on `address` only."""
    if rank:
        store.set(_presence(rank), "here")
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(dist.PrefixStore(GROUP, store), rank, world, options)


def _presence(rank: int) -> str:
    return f"{GROUP}/here/{rank}"


def broadcast(group: dist.ProcessGroupGloo, data: Tensor) -> dist.Work:
    """[bytes] uint8 from rank 0 to all."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([data], options)


class Gloo:
    """`bind`: the trainer's address that engines connect to.  Loopback by default; another one is only used when it is named.
    ValueError for one that this machine does not have."""

    backend = "megatron_plugin_gloo"

    def __init__(self, bind: str = "127.0.0.1", timeout_s: float = 120.0):
        listen(bind).close()
        self.bind = bind
        self.timeout = timedelta(seconds=timeout_s)
        self._groups: dict[int, tuple[dist.ProcessGroupGloo, dist.Store]] = {}
        self._pool = ThreadPoolExecutor(MOST_CALLS, thread_name_prefix="gloo")
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._size = 0

    def open(self, engine: Any) -> None:
        """A group with the workers of one engine.  EngineLostError when they do not come."""
        world = 1 + engine.workers
        listener = listen(self.bind)
        address, port = listener.getsockname()[:2]
        store = dist.TCPStore(address, port, world, True, self.timeout, wait_for_workers=False, master_listen_fd=listener.detach())
        invitation = {"address": address, "port": port, "world_size": world, "timeout_s": self.timeout.total_seconds()}
        answer = self._pool.submit(engine.init_transfer, invitation)
        deadline = time.monotonic() + min(MEET_S, self.timeout.total_seconds())
        # asked, not waited for: joining a group whose others do not come would block until the timeout
        while not store.check([_presence(rank) for rank in range(1, world)]):
            if answer.done():
                answer.result()
            if time.monotonic() > deadline:
                raise EngineLostError(f"{engine.name}: did not come to {address}:{port} for weights: can it reach that address? (rollout.bind)")
            time.sleep(0.001)
        try:
            self._groups[id(engine)] = join(store, 0, world, address, self.timeout), store
        except RuntimeError as error:
            raise EngineLostError(f"{engine.name}: lost while it joined for weights: {error}") from error
        answer.result()

    def start_bucket(self, size: int) -> None:
        """`size`: bytes it will hold at most."""
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        self._size = 0

    def write(self, offset: int, data: Tensor) -> None:
        """[bytes] uint8, at `offset` of the bucket."""
        end = offset + data.numel()
        self._buffer[offset:end].copy_(data)
        self._size = max(self._size, end)

    def deliver(self, engine: Any, manifest: Manifest) -> None:
        """Broadcast the bucket to one engine while it loads.  Called for several engines at once."""
        group, _ = self._groups[id(engine)]
        answer = self._pool.submit(engine.push, vars(manifest))
        work = broadcast(group, self._buffer[: self._size])
        # not wait() at once: a refusal that comes before the engine joins the broadcast would be seen at the timeout only
        while not (work.is_completed() or answer.done()):
            time.sleep(0.0005)
        if answer.done():
            answer.result()
        try:
            work.wait()
        except RuntimeError as error:  # the engine's own answer says more, if there is one
            if wait([answer], timeout=GRACE_S).done:
                answer.result()
            raise EngineLostError(f"{engine.name}: the connection for weights broke: {error}") from error
        answer.result()

    def end_bucket(self) -> None:
        """The buffer is kept for the next bucket."""

    def drop(self, engine: Any) -> None:
        """Leave the group with an engine."""
        self._groups.pop(id(engine), None)

    def close(self) -> None:
        self._groups.clear()
        self._pool.shutdown(wait=False)
