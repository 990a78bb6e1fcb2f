"""Several rollout engines as one: work goes to the least loaded, a lost engine's requests go elsewhere, nothing is lost or answered twice.

    fleet = Fleet(engines, timeout_s=120)
    generated = fleet.generate([Request(("prompts.jsonl:7", 0), prompt_ids, SamplingParams(n=8, max_tokens=256))])
    if generated.missing:                     # engines died and none was left for these
        fleet.restart_dead()                  # STALE now: send the weights, then ask again for what is missing

Every request ends in exactly one of `completions`, `refused` and `missing`.  An engine that gives no answer is SUSPECT until it answers a probe
(slots.py); one that dies, stays silent, is late with two requests or answers something else than was asked is DEAD from then on, whatever it says later,
until `restart_dead` has brought it back; an update makes it HEALTHY.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from megatron_plugin.rollout.dispatch import Books, Call
from megatron_plugin.rollout.engine import EngineLostError, Health, RolloutEngine, WrongModelError
from megatron_plugin.rollout.requests import Generated, Request
from megatron_plugin.rollout.slots import Slot, cause_of, each, probe

__all__ = ["Fleet", "Generated", "Request"]

CONCURRENCY = 64
"""Requests in flight per engine."""


class Fleet:
    """One or more engines with distinct names.

    timeout_s: seconds an engine has for one request; it is SUSPECT when it takes longer, DEAD the second time.  concurrency: requests in flight per
    engine.
    max_restarts: per engine, over the fleet's life.
    """

    def __init__(self, engines: Sequence[RolloutEngine], *, timeout_s: float, concurrency: int = CONCURRENCY, max_restarts: int = 3):
        names = [engine.name for engine in engines]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"engines: got the names {names}, expected at least one engine, each under a name of its own")
        if not timeout_s > 0 or concurrency < 1 or max_restarts < 0:
            raise ValueError(
                f"got timeout_s={timeout_s}, concurrency={concurrency}, max_restarts={max_restarts}; expected seconds > 0, requests >= 1, restarts >= 0"
            )
        self.max_restarts = max_restarts
        self._slots = [Slot(engine) for engine in engines]
        self._books = Books(self._slots, timeout_s, concurrency)

    @property
    def engines(self) -> list[RolloutEngine]:
        """Those that are not DEAD: an update goes to all of them."""
        return [slot.engine for slot in self._alive()]

    def generate(self, requests: Iterable[Request]) -> Generated:
        """Ask for every request, and wait until each is completed, refused or missing.

        Only HEALTHY engines with the newest weights among them are asked.  Waits no longer for any answer than timeout_s (and a tenth),
        and not at all when no engine is left.  May be called from any thread, by several at once: they share `concurrency`, and a call that
        finds every place taken waits for one.  WrongModelError is passed on; every other failure is in the result.
        """
        requests = list(requests)
        counts = Counter(request.key for request in requests)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"requests: got the key {twice[0]!r} {counts[twice[0]]} times, expected every key once: results are found by key")
        if self._books.closed:
            raise ValueError("the fleet is closed: it generates nothing any more")
        already, suspected = set(self.dead()), self._suspected()
        call = Call(self._books, self._usable(), requests)
        call.result.lost = {name: cause for name, cause in self.dead().items() if name not in already}
        generated = call.run()
        generated.suspected = self._suspected() - suspected
        return generated

    def health(self) -> dict[str, Health]:
        """By name, asked of all engines at once, within 10 s.  What is DEAD stays DEAD until restart_dead."""
        probe(self._alive())
        return self.states()

    def states(self) -> dict[str, Health]:
        """The same from memory: no engine is asked."""
        return {slot.engine.name: slot.state for slot in self._slots}

    def dead(self) -> dict[str, str]:
        """Why each DEAD engine is, by name: from memory, no engine is asked."""
        return {slot.engine.name: slot.cause for slot in self._slots if slot.cause is not None}

    def mark_lost(self, engine: RolloutEngine | str, cause: str) -> None:
        """DEAD from now on: for an engine that was lost while something else than this fleet talked to it, as in an update."""
        name = engine if isinstance(engine, str) else engine.name
        slot = next((slot for slot in self._slots if slot.engine.name == name), None)
        if slot is None:
            raise ValueError(f"got the engine '{name}', expected one of {', '.join(slot.engine.name for slot in self._slots)}")
        slot.lose(cause)

    def restart_dead(self) -> list[str]:
        """Bring DEAD engines back, all at once; the names of those that are, STALE until an update has finished.

        An engine whose restart fails, or whose max_restarts are used up, stays DEAD, and the others go on without it.  While that leaves
        no engine at all it is tried again, and EngineLostError (exit code 5) names every cause once no restart is left.
        """
        back = []
        while dead := [slot for slot in self._slots if slot.cause is not None]:
            able = [slot for slot in dead if slot.restarts < self.max_restarts]
            if not able and len(dead) == len(self._slots):
                causes = "; ".join(f"{slot.engine.name}: {slot.cause}" for slot in dead)
                raise EngineLostError(f"no rollout engine is left, and each was restarted {self.max_restarts} times, as often as allowed: {causes}")
            for slot, outcome in zip(able, each(able, lambda engine: engine.restart()), strict=True):
                slot.restarts += 1
                if isinstance(outcome, WrongModelError):
                    raise outcome
                if isinstance(outcome, BaseException):
                    slot.cause = f"{slot.cause}; restart {slot.restarts} failed: {cause_of(outcome)}"
                else:
                    slot.revive()
                    back.append(slot.engine.name)
            if self._books.closed:  # by a signal handler, meanwhile: what was just started must not outlive it
                for slot in able:
                    slot.engine.close()
                raise EngineLostError("the fleet was closed while its engines were restarted")
            if self._alive():
                break
        return back

    def sleep(self, level: int = 1) -> None:
        """All engines that are not DEAD, at once; so does wake.  One that is lost over it is marked, any other error is raised."""
        self._all(lambda engine: engine.sleep(level))

    def wake(self) -> None:
        self._all(lambda engine: engine.wake())

    def close(self) -> dict[str, str]:
        """Release every engine, once; the causes, by name, of those that could not be.  A running `generate` ends with what it has.

        Takes no lock and starts no thread: a signal handler may call it whatever the main thread was doing.
        """
        failed: dict[str, str] = {}
        if self._books.closed:
            return failed
        self._books.closed = True
        for slot in self._slots:
            try:
                slot.engine.close()
            except Exception as error:  # the others must be released all the same
                failed[slot.engine.name] = cause_of(error)
        return failed

    def _alive(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.cause is None]

    def _suspected(self) -> int:
        return sum(slot.suspected for slot in self._slots)

    def _usable(self) -> list[Slot]:
        """HEALTHY engines with the newest weights among them, and SUSPECT ones that had them: completions of one call are never of mixed weights."""
        states = self.health()
        usable = [slot for slot in self._slots if states[slot.engine.name] in (Health.HEALTHY, Health.SUSPECT) and slot.version >= 0]
        newest = max((slot.version for slot in usable), default=-1)
        return [slot for slot in usable if slot.version == newest]

    def _all(self, act: Callable[[RolloutEngine], None]) -> None:
        alive, errors = self._alive(), []
        for slot, outcome in zip(alive, each(alive, act), strict=True):
            if isinstance(outcome, EngineLostError):
                slot.lose(cause_of(outcome))
            elif isinstance(outcome, BaseException):
                errors.append(outcome)
        if errors:
            raise errors[0]
