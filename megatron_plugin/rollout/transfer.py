"""The newest weights into every engine: tensors -> buckets -> a transport -> vLLM's own start, update and finish.

    report = send_weights(engines, hf_tensors(model), version=7, transport=SharedMemory())

Tensors come one by one and go as they come: no more than one bucket is held, and of the model nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_plugin.rollout.engine import EngineError, EngineLostError
from megatron_plugin.rollout.transports.bucket import Manifest, as_bytes
from megatron_plugin.rollout.transports.gloo import Gloo
from megatron_plugin.rollout.transports.nccl import Nccl
from megatron_plugin.rollout.transports.shm import SharedMemory

__all__ = ["TRANSPORTS", "TransferReport", "Transport", "send_weights"]

TRANSPORTS: dict[str, Callable[..., Transport]] = {"shm": SharedMemory, "gloo": Gloo, "nccl": Nccl}


class Transport(Protocol):
    """Carries the bytes of buckets.  Used by one send_weights at a time; `deliver` for several engines at once."""

    backend: str
    """The weight-transfer backend that the engines were started with."""

    def open(self, engine: Any) -> None:
        """Before the first bucket of an update, for each engine."""

    def start_bucket(self, size: int) -> None: ...

    def write(self, offset: int, data: Tensor) -> None: ...

    def deliver(self, engine: Any, manifest: Manifest) -> None:
        """push to one engine, and the bytes with it.  EngineLostError, EngineError."""

    def end_bucket(self) -> None: ...

    def drop(self, engine: Any) -> None:
        """After the update, or when the engine was lost."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class TransferReport:
    """Of one update."""

    bytes: int
    """Of the weights, counted once however many engines there are."""
    buckets: int
    seconds: float
    """From begin to finish: generation stands still that long."""
    lost: tuple[Any, ...] = field(default=(), repr=False)
    """Engines that died on the way; the others have the new weights."""


def send_weights(
    engines: Sequence[Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    version: int,
    transport: Transport,
    bucket_bytes: int = 512 << 20,
    checksums: bool = False,
    dtype: torch.dtype | None = None,
) -> TransferReport:
    """Update all engines to `version`.  tensors: (Hugging Face name, full tensor on any device), all of the model, each once.

    One bucket is held at a time, or one tensor where it is larger.  `dtype`: floating-point tensors are cast to it first (the engines').
    `tensors` is always exhausted, whatever happens to the engines: making them may be a collective in which other ranks wait.
    An engine that dies is in report.lost, and the others go on.  EngineError when an engine refuses: then engines that have not finished forget
    the update and stay STALE until the next one, which may be tried at once.  The same holds for what `tensors` raises."""
    update = _Update(list(engines), transport, checksums, bucket_bytes)
    started = time.perf_counter()
    with ThreadPoolExecutor(max(len(update.live), 1), thread_name_prefix="weights") as update.pool:
        try:
            update.each(lambda engine: _check_backend(engine, transport))
            update.each(lambda engine: engine.begin_update(version))
            update.each(transport.open)
            for name, tensor in tensors:
                update.add(name, tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype))
            update.flush()
            update.each(lambda engine: engine.finish_update())
        except BaseException as error:  # of `tensors`, or an interrupt: ours are kept in update.failure
            update.failure = error
        try:
            transport.end_bucket()
        except Exception as error:
            update.failure = update.failure or error
        if update.failure:
            update.forget()
        for engine in engines:
            transport.drop(engine)
    if update.failure:
        raise update.failure
    return TransferReport(update.bytes, update.buckets, time.perf_counter() - started, tuple(update.lost))


def _check_backend(engine: Any, transport: Transport) -> None:
    if engine.backend != transport.backend:
        raise EngineError(
            f"{engine.name}: got an engine that takes weights by {engine.backend or 'nothing'}, expected {transport.backend}: "
            "start it with the same transfer as the trainer's"
        )


class _Update:
    """The state of one update."""

    pool: ThreadPoolExecutor

    def __init__(self, engines: list[Any], transport: Transport, checksums: bool, bucket_bytes: int):
        if bucket_bytes < 1:
            raise ValueError(f"got bucket_bytes={bucket_bytes}, expected at least 1")
        self.live = engines
        self.lost: list[Any] = []
        self.failure: BaseException | None = None
        self.transport = transport
        self.checksums = checksums
        self.bucket_bytes = bucket_bytes
        self.manifest: Manifest | None = None
        self.bytes = self.buckets = 0

    def each(self, call: Callable[[Any], None]) -> None:
        """call(engine) for all engines at once.  The lost leave; the first failure is kept, and after it nothing is called any more."""
        if self.failure:
            return
        answers = [(engine, self.pool.submit(call, engine)) for engine in self.live]
        for engine, answer in answers:
            try:
                answer.result()
            except EngineLostError:
                self.live.remove(engine)
                self.lost.append(engine)
                self.transport.drop(engine)
            except Exception as error:  # raised later: `tensors` must be exhausted first
                self.failure = self.failure or error

    def add(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into the bucket, which is sent first when the tensor does not fit any more."""
        if self.failure or not self.live:
            return
        try:
            data = as_bytes(tensor)
            if self.manifest and data.numel() and self.manifest.next_offset() + data.numel() > self.bucket_bytes:
                self.flush()
            if self.manifest is None:
                self.manifest = Manifest()
                self.transport.start_bucket(max(self.bucket_bytes, data.numel()))
            self.transport.write(self.manifest.add(name, tensor, data, checksum=self.checksums), data)
            self.bytes += data.numel()
        except Exception as error:  # such as a full /dev/shm; raised later, as in each()
            self.failure = error

    def flush(self) -> None:
        """Let every engine load the bucket."""
        if manifest := self.manifest:
            self.manifest = None
            self.each(lambda engine: self.transport.deliver(engine, manifest))
            self.transport.end_bucket()
            self.buckets += 1

    def forget(self) -> None:
        """After a refusal: no engine keeps half an update."""
        for engine in self.live:
            try:
                engine.abort_update()
            except EngineError:  # lost, or it refuses this too: STALE either way
                pass
