"""Requests to engines and back: one `Call` per Fleet.generate.

The caller's thread decides everything; a thread per request in flight only asks, and hands back what came of it.  An attempt that was given up
(its engine is lost, or the call is over) hands back nothing: its answer is thrown away and counted, so no request is answered twice.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_plugin.rollout.engine import Completion, EngineError, EngineLostError, Health, RolloutEngine, SamplingParams, WrongModelError

__all__ = ["Books", "Call", "Generated", "Request", "Slot", "cause_of", "each"]

GRACE_S = 1.0  # after a deadline, for the engine's own error, which says more than "no answer"; at most a tenth of the deadline
POLL_S = 0.5  # between looks at whether the fleet was closed
MAX_TRIES = 3  # engines that one request may see lost: a prompt that kills engines must not go through the whole fleet


@dataclass(frozen=True)
class Request:
    """One prompt, of which params.n completions are wanted.  `key` names it in the results."""

    key: Hashable
    prompt_ids: Sequence[int]
    params: SamplingParams


@dataclass
class Generated:
    """What became of the requests of one `generate`, each key in exactly one of the first three, and its counters."""

    completions: dict[Hashable, list[Completion]] = field(default_factory=dict)
    refused: dict[Hashable, str] = field(default_factory=dict)
    """Causes.  A healthy engine said no to this prompt, as to one that leaves no room: asking again would not help."""
    missing: dict[Hashable, str] = field(default_factory=dict)
    """Causes.  No engine was left to ask: ask again after `restart_dead` and an update."""
    lost: dict[str, str] = field(default_factory=dict)
    """Engines that were found DEAD by this call, with causes."""
    retried: int = 0
    """Times a request was taken from a lost engine, to be asked elsewhere."""
    late: int = 0
    """Answers thrown away because their engine had been given up, since the last call's result."""
    empty: int = 0
    """Completions without a token.  They are kept."""
    tokens: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class Slot:
    """An engine and what is known of it."""

    engine: RolloutEngine
    cause: str | None = None
    """Why it is DEAD; None: it is not."""
    load: int = 0
    """Requests in flight, of all calls."""
    asked: int = 0
    restarts: int = 0

    def lose(self, cause: str) -> None:
        self.cause = self.cause or cause  # the first cause explains the later ones

    @property
    def version(self) -> int:
        return -1 if self.engine.weight_version is None else self.engine.weight_version


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
    """The requests of one `generate`, asked of `usable`: slots with the same weights."""

    def __init__(self, books: Books, usable: Sequence[Slot], requests: Sequence[Request]):
        self.books, self.usable, self.begin = books, list(usable), time.monotonic()
        self.pending = deque(requests)
        self.running: set[_Attempt] = set()
        self.tries: Counter[Hashable] = Counter()
        self.version = max((slot.version for slot in usable), default=-1)
        self.handed_back: queue.SimpleQueue[tuple[_Attempt, Any, bool] | None] = queue.SimpleQueue()
        """(attempt, completions or error, whether the engine can go on); None: another call left a place."""
        self.result = Generated()

    def run(self) -> Generated:
        """Until nothing is in flight and nothing pending can be asked.  An engine whose places other calls have is waited for."""
        with self.books.lock:
            self.books.calls.add(self)
        try:
            self._give_out()
            while (self.running or (self.pending and self.usable)) and not self.books.closed:
                self._wait()
                self._give_out()
            self.pending.extend(attempt.request for attempt in self.running)
        finally:
            with self.books.lock:
                self.books.calls.discard(self)
            self._give_up(self.running)
        for request in self.pending:
            self.result.missing[request.key] = self._why_missing()
        self.result.seconds = time.monotonic() - self.begin
        with self.books.lock:
            self.result.late, self.books.late = self.books.late, 0
        return self.result

    def _give_out(self) -> None:
        """Pending requests to the least loaded engines, up to `concurrency` each."""
        self.usable = [slot for slot in self.usable if slot.cause is None]
        while self.pending and self.usable and not self.books.closed:
            with self.books.lock:  # looked at and taken at once: another call may take the place in between
                slot = min(self.usable, key=lambda slot: (slot.load, slot.asked))
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
        engine, request, healthy = attempt.slot.engine, attempt.request, True
        try:
            outcome: Any = engine.generate(request.prompt_ids, request.params, timeout_s=self.books.timeout_s)
        except BaseException as error:
            outcome, healthy = error, _is_refusal(error) and _is_healthy(engine)
        with self.books.lock:
            if attempt.given_up:
                self.books.late += not isinstance(outcome, BaseException)
            else:
                self.handed_back.put((attempt, outcome, healthy))

    def _wait(self) -> None:
        """For one answer, a place or the next deadline; an engine that missed one is lost."""
        nearest = min((attempt.deadline for attempt in self.running), default=math.inf) - time.monotonic()
        try:
            back = self.handed_back.get(timeout=min(max(nearest, 0.0), POLL_S))
        except queue.Empty:
            now = time.monotonic()
            for attempt in [attempt for attempt in self.running if attempt.deadline <= now]:
                self._lose(attempt.slot, f"no answer within {self.books.timeout_s:g} s")
            return
        if back is None:
            return
        attempt, outcome, healthy = back
        if attempt in self.running and attempt.slot.cause is None:
            self._take(attempt, outcome, healthy)
            return
        with self.books.lock:  # given up, or its engine marked lost, while this answer was on its way
            self.books.late += not isinstance(outcome, BaseException)
        if attempt in self.running:
            self._lose(attempt.slot, attempt.slot.cause or "lost")

    def _take(self, attempt: _Attempt, outcome: Any, healthy: bool) -> None:
        slot, key, result = attempt.slot, attempt.request.key, self.result
        if isinstance(outcome, WrongModelError):
            raise outcome
        if _is_refusal(outcome) and healthy:
            result.refused[key] = f"{slot.engine.name}: {cause_of(outcome)}"
        elif isinstance(outcome, BaseException):
            # A STALE engine was restarted behind our back and refuses everything: its requests are not to blame.
            cause = f"it can generate no longer: {cause_of(outcome)}" if _is_refusal(outcome) else cause_of(outcome)
            return self._lose(slot, cause)
        elif fault := self._fault(attempt.request, outcome):
            return self._lose(slot, fault)
        else:
            result.completions[key] = list(outcome)
            result.empty += sum(not completion.token_ids for completion in outcome)
            result.tokens += sum(len(completion.token_ids) for completion in outcome)
        self._give_up([attempt])

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
        self.result.lost.setdefault(slot.engine.name, cause)
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
            for call in self.books.calls - {self}:
                call.handed_back.put(None)

    def _why_missing(self) -> str:
        if self.books.closed:
            return "the fleet was closed"
        return "no engine is left to ask: " + "; ".join(f"{slot.engine.name}: {slot.cause or 'has no complete new weights'}" for slot in self.books.slots)


def each(slots: Sequence[Slot], act: Callable[[RolloutEngine], Any], limit_s: float | None = None) -> list[Any]:
    """act(engine) of all slots at once: what each returned or raised; EngineLostError for one that took longer than limit_s."""
    outcomes: list[Any] = [EngineLostError(f"no answer within {limit_s} s")] * len(slots)

    def run(index: int) -> None:
        try:
            outcomes[index] = act(slots[index].engine)
        except BaseException as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(slots))]
    for thread in threads:
        thread.start()
    end = None if limit_s is None else time.monotonic() + limit_s
    for thread in threads:
        thread.join(None if end is None else max(0.0, end - time.monotonic()))
    return outcomes


def cause_of(error: BaseException) -> str:
    """The message; of an error that is none of an engine's, its type too."""
    return str(error) if isinstance(error, EngineError) and str(error) else f"{type(error).__name__}: {error}"


def _is_refusal(outcome: Any) -> bool:
    return isinstance(outcome, EngineError) and not isinstance(outcome, (EngineLostError, WrongModelError))


def _is_healthy(engine: RolloutEngine) -> bool:
    try:
        return engine.health() is Health.HEALTHY
    except Exception:
        return False
