"""Requests to engines and back: one `Call` per Fleet.generate.

The caller's thread decides everything; a thread per request in flight only asks, and hands back what came of it.  An attempt that was given up
(its engine is lost, or the call is over) hands back nothing: its answer is thrown away and counted, so no request is answered twice.

What failed on the way (no answer, none in time, HTTP 5xx, a body that is none) is asked again up to 5 times, each time after a longer wait; what an
engine that is well refuses, or answers with numbers that cannot be, is not.  Bounded: in flight are `concurrency` requests per engine, each with a
thread, and what waits is the call's own requests.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_plugin.rollout.engine import EngineBusyError, EngineLostError, EngineTimeoutError, Health, WrongModelError
from megatron_plugin.rollout.requests import Generated, Request
from megatron_plugin.rollout.slots import Slot, backoff, cause_of, health_of, is_refusal, probe

__all__ = ["Books", "Call"]

GRACE_S = 1.0  # after a deadline, for the engine's own error, which says more than "no answer"; at most a tenth of the deadline
POLL_S = 0.5  # between looks at whether the fleet was closed
MAX_TRIES = 3  # engines that one request may see lost: a prompt that kills engines must not go through the whole fleet
RETRIES = 5  # of what failed on the way to an engine that lives; a missed deadline counts twice, since it took the longest already


@dataclass
class Books:
    """What all calls of a fleet share."""

    slots: list[Slot]
    timeout_s: float
    concurrency: int
    late: int = 0
    closed: bool = False
    calls: set[Call] = field(default_factory=set)
    """Those that run: they share the engines' places, and each is told when one falls vacant."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of late, calls, Slot.load and _Attempt.given_up; never held while an engine is asked, nor taken by Fleet.close."""


@dataclass(eq=False)
class _Attempt:
    """A request at an engine."""

    request: Request
    slot: Slot
    deadline: float
    given_up: bool = False


class Call:
    """The requests of one `generate`, asked of `slots`, which have the same weights: of those among them that are HEALTHY."""

    def __init__(self, books: Books, slots: Sequence[Slot], requests: Sequence[Request]):
        self.books, self.slots, self.usable = books, list(slots), list(slots)
        self.pending = deque(requests)
        self.waiting: list[tuple[float, Request]] = []
        """(time.monotonic() from which it is asked again, request)"""
        self.running: set[_Attempt] = set()
        self.tries: Counter[Hashable] = Counter()
        """Engines that the request saw lost."""
        self.failed: Counter[Hashable] = Counter()
        """Times the request failed on the way."""
        self.version = max((slot.version for slot in slots), default=-1)
        self.handed_back: queue.SimpleQueue[tuple[_Attempt, Any, Health] | None] = queue.SimpleQueue()
        """(attempt, completions or error, how the engine is after an error); None: another call left a place, or a probe was answered."""
        self.result = Generated()

    def run(self) -> Generated:
        """Until nothing is in flight and nothing pending can be asked.  An engine whose places other calls have is waited for."""
        with self.books.lock:
            self.books.calls.add(self)
        try:
            self._give_out()
            while (self.running or ((self.pending or self.waiting) and self.usable)) and not self.books.closed:
                self._wait()
                self._look_around()
                self._give_out()
            self.pending.extend(attempt.request for attempt in self.running)
            self.pending.extend(request for _, request in self.waiting)
        finally:
            with self.books.lock:
                self.books.calls.discard(self)
            self._give_up(self.running)
        for request in self.pending:
            self.result.missing[request.key] = self._why_missing()
        self.result.lost |= {slot.engine.name: slot.cause for slot in self.slots if slot.cause is not None and slot.engine.name not in self.result.lost}
        with self.books.lock:
            self.result.late, self.books.late = self.books.late, 0
        return self.result

    def _give_out(self) -> None:
        """Pending requests to the least loaded HEALTHY engines, up to `concurrency` each."""
        while self.pending and not self.books.closed:
            healthy = [slot for slot in self.usable if slot.state is Health.HEALTHY]
            if not healthy:
                return
            with self.books.lock:  # looked at and taken at once: another call may take the place in between
                slot = min(healthy, key=lambda slot: (slot.load, slot.asked))
                if slot.load >= self.books.concurrency:
                    return
                slot.load += 1
                slot.asked += 1
            allowed_s = self.books.timeout_s + min(GRACE_S, 0.1 * self.books.timeout_s)
            attempt = _Attempt(self.pending.popleft(), slot, time.monotonic() + allowed_s)
            self.running.add(attempt)
            # Daemons, not an executor: at exit the interpreter would wait for the threads of an engine that hangs.
            threading.Thread(target=self._ask, args=(attempt,), name=f"rollout {slot.engine.name}", daemon=True).start()

    def _ask(self, attempt: _Attempt) -> None:
        """In a thread of its own."""
        engine, request, health = attempt.slot.engine, attempt.request, Health.HEALTHY
        try:
            outcome: Any = engine.generate(request.prompt_ids, request.params, timeout_s=self.books.timeout_s)
        except BaseException as error:
            outcome, health = error, health_of(engine)
        with self.books.lock:
            if attempt.given_up:
                self.books.late += not isinstance(outcome, BaseException)
            else:
                self.handed_back.put((attempt, outcome, health))

    def _wait(self) -> None:
        """For one answer, a place, or whatever is due next."""
        due = [attempt.deadline for attempt in self.running] + [at for at, _ in self.waiting] + [slot.probe_at for slot in self.usable]
        try:
            back = self.handed_back.get(timeout=min(max(min(due, default=math.inf) - time.monotonic(), 0.0), POLL_S))
        except queue.Empty:
            return
        if back is None or self.books.closed:  # closed: what engines say now is said of their end
            return
        attempt, outcome, health = back
        if attempt in self.running and attempt.slot.cause is None:
            self._take(attempt, outcome, health)
            return
        with self.books.lock:  # given up, or its engine marked lost, while this answer was on its way
            self.books.late += not isinstance(outcome, BaseException)

    def _look_around(self) -> None:
        """Deadlines, engines that others found DEAD or gave other weights, requests to be asked again, probes."""
        if self.books.closed:
            return
        now = time.monotonic()
        for attempt in [attempt for attempt in self.running if attempt.deadline <= now]:
            if attempt in self.running:  # else its engine was lost over the one before
                self._fail(attempt, EngineTimeoutError(f"no answer within {self.books.timeout_s:g} s"), health=None)
        for slot in self.usable:
            if slot.cause is not None or slot.version != self.version:
                self._lose(slot, slot.cause or "its weights are no longer those that were asked")
        self.usable = [slot for slot in self.usable if slot.cause is None]
        self.pending.extend(request for at, request in self.waiting if at <= now)
        self.waiting = [(at, request) for at, request in self.waiting if at > now]
        for slot in self.usable:
            if slot.probe_is_due():
                threading.Thread(target=self._probe, args=(slot,), name=f"probe {slot.engine.name}", daemon=True).start()

    def _probe(self, slot: Slot) -> None:
        """In a thread of its own; what is found holds for all calls."""
        probe([slot])
        self._tell(self.books.calls)

    def _take(self, attempt: _Attempt, outcome: Any, health: Health) -> None:
        slot, key, result = attempt.slot, attempt.request.key, self.result
        if isinstance(outcome, WrongModelError):
            raise outcome
        if is_refusal(outcome) and health is Health.HEALTHY:
            result.refused[key] = f"{slot.engine.name}: {cause_of(outcome)}"
        elif isinstance(outcome, (EngineBusyError, EngineLostError)) or (is_refusal(outcome) and health is Health.SUSPECT):
            return self._fail(attempt, outcome, health)
        elif isinstance(outcome, BaseException):
            # A STALE engine was restarted behind our back and refuses everything: its requests are not to blame.
            cause = f"it can generate no longer: {cause_of(outcome)}" if is_refusal(outcome) else cause_of(outcome)
            return self._lose(slot, cause)
        elif fault := self._fault(attempt.request, outcome):
            return self._lose(slot, fault)
        else:
            result.completions[key] = list(outcome)
            result.tokens += sum(len(completion.token_ids) for completion in outcome)
            slot.overdue.clear()
        self._give_up([attempt])

    def _fail(self, attempt: _Attempt, error: BaseException, health: Health | None) -> None:
        """It failed on the way, and the engine is in this `health` (None: not known, it has not come back).  Asked again, unless that was the last time."""
        slot, key, cause = attempt.slot, attempt.request.key, cause_of(error)
        late = isinstance(error, EngineTimeoutError)
        if late:
            slot.missed_deadline((id(self), key), cause)  # two calls may use one key
        elif health is Health.SUSPECT:
            slot.suspect(cause)
        if slot.cause is not None or health in (Health.DEAD, Health.STALE):
            return self._lose(slot, cause)
        self.failed[key] += 2 if late else 1
        if self.failed[key] > RETRIES and health is Health.SUSPECT:
            return self._lose(slot, f"it failed {RETRIES + 1} times: {cause}")
        self._give_up([attempt])
        if self.failed[key] > RETRIES:
            self.result.refused[key] = f"{slot.engine.name}: asked as often as allowed, the last time: {cause}"
            return
        self.waiting.append((time.monotonic() + backoff(self.failed[key]), attempt.request))
        self.result.retried += 1

    def _fault(self, request: Request, answer: Any) -> str | None:
        """What makes the answer another one than was asked for."""
        if not isinstance(answer, (list, tuple)) or len(answer) != request.params.n:
            got = f"{len(answer)} completions" if isinstance(answer, (list, tuple)) else type(answer).__name__
            return f"it answered with {got}, expected {request.params.n} completions"
        for completion in answer:
            if completion.weight_version != self.version:
                return f"it answered with weights {completion.weight_version}, expected {self.version}"
            if len(completion.token_ids) != len(completion.logprobs):
                return f"it answered with {len(completion.logprobs)} logprobs for {len(completion.token_ids)} tokens"
        return None

    def _lose(self, slot: Slot, cause: str) -> None:
        """The engine is DEAD; all it was asked goes back, to be asked elsewhere."""
        slot.lose(cause)
        cause = self.result.lost.setdefault(slot.engine.name, slot.cause or cause)
        lost = [attempt for attempt in self.running if attempt.slot is slot]
        self._give_up(lost)
        for attempt in lost:
            key = attempt.request.key
            self.tries[key] += 1
            if self.tries[key] < MAX_TRIES:
                self.pending.appendleft(attempt.request)
                self.result.retried += 1
            else:
                self.result.missing[key] = f"asked of {MAX_TRIES} engines, each was lost; the last, {slot.engine.name}: {cause}"

    def _give_up(self, attempts: Iterable[_Attempt]) -> None:
        """No answer of theirs is wanted any more; their places are vacant."""
        with self.books.lock:
            for attempt in list(attempts):
                attempt.given_up = True
                attempt.slot.load = max(0, attempt.slot.load - 1)
                self.running.discard(attempt)
            self._tell(self.books.calls - {self})

    @staticmethod
    def _tell(calls: Iterable[Call]) -> None:
        """That there may be something to do."""
        for call in list(calls):
            call.handed_back.put(None)

    def _why_missing(self) -> str:
        if self.books.closed:
            return "the fleet was closed"
        return "no engine is left to ask: " + "; ".join(f"{slot.engine.name}: {slot.cause or 'has no complete new weights'}" for slot in self.books.slots)
