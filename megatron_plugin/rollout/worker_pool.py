"""Judging answers in processes of their own: an answer may hang the judge, fill the memory or crash it, and only its own reward is lost.

    with Workers({"kind": "math"}, timeout_s=5, memory_mb=1024) as workers:
        workers.judge([{"prompt": "...", "completion": "...", "reference": "...", "finish_reason": "stop"}])   # [Verdict(1.0, "right")]

Parent and worker exchange lines of JSON over pipes: nothing is pickled, and what a judge prints goes to stderr.  The worker's own alarm
ends an answer that takes too long; the parent's clock stands behind it.  A worker has no network (no_network.py), and a judge of ours does not
see the environment either, where keys are.  This is a fence against accidents, not against code that means harm: it can read files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_plugin.rollout.reward_worker import Verdict

__all__ = ["WorkerStartError", "Workers"]

log = logging.getLogger("megatron_plugin")
START_S = 120.0  # the start of a math judge takes 0.6 s of a free core; the module of a user's function may import torch
HARMLESS = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "VIRTUAL_ENV", "PYTHONHASHSEED")
"""Variables that a judge of ours is given; a user's function is given all."""
GRACE_S = 1.0  # after the worker's own alarm


class WorkerStartError(ValueError):
    """The judge cannot be set up: a package or function that is not there, a pattern that is none."""


class Workers:
    """`count` worker processes for one task, started when first needed and again after each one that was lost.

    task: {"kind": "math"}, {"kind": "format", "pattern": ..., "full": bool} or {"kind": "user", "path": "package.module.function"}.
    timeout_s: seconds per answer.  memory_mb: MiB of address space per worker beyond what it takes after its imports.  network: whether a
    worker may open network sockets.
    """

    def __init__(self, task: Mapping[str, Any], *, timeout_s: float, memory_mb: int, count: int = 1, network: bool = False):
        if not timeout_s > 0 or memory_mb < 1 or count < 1:
            raise ValueError(f"got timeout_s={timeout_s}, memory_mb={memory_mb}, count={count}; expected seconds > 0, MiB >= 1, workers >= 1")
        self.task = {**task, "timeout_s": timeout_s, "memory_mb": memory_mb, "network": network}
        self.timeout_s = timeout_s
        self.counts: Counter[str] = Counter()
        """lost workers by cause (timeout, memory, crash), and answers asked again of a fresh worker (again)"""
        self._workers = [_Worker(self.task) for _ in range(count)]

    def start(self) -> None:
        """Start one worker now, to learn at once whether the task can be done: WorkerStartError when not."""
        self._workers[0].start()
        if self._workers[0].network_kept:
            log.warning("reward workers keep the network: %s", self._workers[0].network_kept)

    def judge(self, samples: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict per sample, in order."""
        verdicts: list[Verdict | None] = [None] * len(samples)
        todo, again = deque(range(len(samples))), set()
        busy: dict[_Worker, int] = {}
        try:
            while todo or busy:
                for worker in self._workers:
                    if todo and worker not in busy:
                        busy[worker] = index = todo.popleft()
                        if index in again:  # of a fresh one: that which is free may be as full as the one that was lost
                            worker.close()
                        worker.ask(samples[index], self.timeout_s + GRACE_S)
                for worker in _ready(list(busy)):
                    index = busy.pop(worker)
                    verdict = worker.verdict()
                    if verdict.cause in ("timeout", "memory", "crash"):
                        self.counts[verdict.cause] += 1
                        # What earlier answers left behind may be to blame; a hang is the answer's own.
                        if verdict.cause != "timeout" and worker.answered > 1:
                            again.add(index)
                            todo.appendleft(index)
                            self.counts["again"] += 1
                            verdict = None
                        worker.close()
                    verdicts[index] = verdict
        finally:
            for worker in busy:  # interrupted: its answer would be taken for that of the next question
                worker.close()
        return verdicts

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Worker:
    """The parent's end of one worker process, which answers one question at a time."""

    def __init__(self, task: Mapping[str, Any]):
        self.task, self.process, self.deadline, self.answered, self._buffer = task, None, 0.0, 0, b""
        self.network_kept = ""
        """Why it could not leave the network, if it should have."""

    def start(self) -> None:
        if self.process is not None:
            return
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # the user's function is found where it is found here
        environment = os.environ if self.task["kind"] == "user" else {name: os.environ[name] for name in HARMLESS if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_plugin.rollout.reward_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env={**environment, "PYTHONPATH": paths},
        )  # fmt: skip
        self.answered, self._buffer = 0, b""
        self.deadline = time.monotonic() + START_S
        self._send(self.task)
        while not self.is_ready():
            select.select([self.process.stdout], [], [], max(0.0, min(1.0, self.deadline - time.monotonic())))
        reply = self._reply()
        if not reply or not reply.get("ready"):
            self.close()
            raise WorkerStartError(reply["failed"] if reply else f"the reward worker ended at its start or took longer than {START_S:g} s")
        self.network_kept = reply["network_kept"]

    def ask(self, sample: Mapping[str, Any], limit_s: float) -> None:
        self.start()
        self.answered += 1
        self.deadline = time.monotonic() + limit_s
        self._send(sample)

    def is_ready(self) -> bool:
        """Whether there is a line, the end of the pipe, or nothing more to wait for.  Reads what there is."""
        if select.select([self.process.stdout], [], [], 0)[0]:
            more = os.read(self.process.stdout.fileno(), 65536)
            self._buffer += more
            if not more or self._buffer.endswith(b"\n"):
                return True
        return time.monotonic() >= self.deadline

    def verdict(self) -> Verdict:
        """Of the sample asked; to be called once ready."""
        reply = self._reply()
        if reply is not None:
            return Verdict(**reply)
        late, code = time.monotonic() >= self.deadline, self.close()
        if late or code == -signal.SIGALRM:
            return Verdict(0.0, "timeout", f"no verdict within {self.task['timeout_s']:g} s")
        return Verdict(0.0, "crash", f"the worker ended with code {code}")

    def close(self) -> int | None:
        """End the process and what it started; its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        try:
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        except ProcessLookupError:
            pass
        with contextlib.suppress(BrokenPipeError):  # a question that found it dead is in the buffer still; the pipe is closed all the same
            process.stdin.close()
        process.stdout.close()
        return process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")  # ASCII: half surrogates are escaped
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which is_ready will see

    def _reply(self) -> dict | None:
        line, self._buffer = self._buffer, b""
        return json.loads(line) if line.endswith(b"\n") else None


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """Those with a verdict; waits for the first."""
    while not (ready := [worker for worker in workers if worker.is_ready()]):
        nearest = min(worker.deadline for worker in workers) - time.monotonic()
        select.select([worker.process.stdout for worker in workers], [], [], max(0.0, nearest))
    return ready
