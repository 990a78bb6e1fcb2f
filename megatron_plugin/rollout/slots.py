"""The engines of a fleet and what is known of each: HEALTHY, SUSPECT, STALE or DEAD (engine.py: Health), and why.

    HEALTHY --no answer, or none in time--> SUSPECT --answers a probe--> HEALTHY
                                            SUSPECT --misses 3 probes, or a second request's deadline--> DEAD --restart--> STALE --update--> HEALTHY

Every change is logged once, where it happens.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_plugin.rollout.engine import EngineBusyError, EngineError, EngineLostError, Health, RolloutEngine, WrongModelError

__all__ = ["PROBES", "Slot", "backoff", "cause_of", "each", "health_of", "is_refusal", "probe"]

log = logging.getLogger("megatron_plugin")
BACKOFF_S, LONGEST_S = 1.0, 30.0  # 1, 2, 4, 8, 16 s: five tries again in 31 s
HEALTH_S = 10.0  # an engine that does not say how it is within this time has missed a probe
PROBES = 3  # missed in a row by an engine that is DEAD then; a refused connection takes 3 s to be one, a network that swallows everything 33 s
DEADLINES = 2  # requests that an engine may be late with, without an answer between


def backoff(tries: int) -> float:
    """Seconds to wait after so many failed tries: doubling, up to 30, give or take half, so that many that failed at once do not come back at once."""
    return min(LONGEST_S, BACKOFF_S * 2 ** (tries - 1) * random.uniform(0.5, 1.5))


@dataclass(eq=False)
class Slot:
    """An engine and what is known of it.  Changed by calls in several threads; each change is one assignment that any order of leaves right."""

    engine: RolloutEngine
    cause: str | None = None
    """Why it is DEAD; None: it is not."""
    suspicion: str | None = None
    """Why it is SUSPECT; None: it is not."""
    load: int = 0
    """Requests in flight, of all calls."""
    asked: int = 0
    restarts: int = 0
    suspected: int = 0
    """Times it became SUSPECT."""
    missed: int = 0
    """Probes, in a row."""
    overdue: set[Hashable] = field(default_factory=set)
    """Requests that missed a deadline since its last answer."""
    probe_at: float = math.inf
    """time.monotonic() of the next probe."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of probe_at."""

    @property
    def version(self) -> int:
        return -1 if self.engine.weight_version is None else self.engine.weight_version

    @property
    def state(self) -> Health:
        """From memory: the engine is not asked."""
        if self.cause is not None:
            return Health.DEAD
        return Health.SUSPECT if self.suspicion is not None else Health.STALE if self.version < 0 else Health.HEALTHY

    def lose(self, cause: str) -> None:
        """DEAD.  The first cause explains the later ones."""
        if self.cause is None:
            self.cause = cause
            log.warning("rollout engine %s is DEAD: %s", self.engine.name, cause)

    def suspect(self, cause: str) -> None:
        """SUSPECT, unless it is that or DEAD already; a probe is due soon."""
        if self.state not in (Health.SUSPECT, Health.DEAD):
            self.suspected += 1
            self.missed, self.suspicion, self.probe_at = 0, cause, time.monotonic() + backoff(1)
            log.warning("rollout engine %s is SUSPECT: %s", self.engine.name, cause)

    def clear(self) -> None:
        """It answered."""
        if self.suspicion is not None and self.cause is None:
            log.warning("rollout engine %s answers again", self.engine.name)
        self.suspicion, self.missed, self.probe_at = None, 0, math.inf

    def revive(self) -> None:
        """Restarted: nothing held against it is true any more."""
        self.cause = self.suspicion = None
        self.missed, self.overdue, self.probe_at = 0, set(), math.inf

    def missed_deadline(self, key: Hashable, cause: str) -> None:
        """Of a request.  DEAD when it is the second one: of one alone, which misses every deadline, the request may be to blame."""
        self.overdue.add(key)
        if len(self.overdue) >= DEADLINES:
            self.lose(f"{cause}, for {len(self.overdue)} requests without an answer between")
        else:
            self.suspect(cause)

    def probed(self, said: Any) -> None:
        """What health() returned or raised."""
        if self.cause is not None:
            return
        if said is Health.DEAD:
            self.lose(f"{self.suspicion}; found dead" if self.suspicion else "found dead")
        elif said in (Health.HEALTHY, Health.STALE):
            self.clear()
        else:
            why = cause_of(said) if isinstance(said, BaseException) else "no answer" if said is Health.SUSPECT else f"health() returned {said!r}"
            self.suspect(f"missed a health probe: {why}")
            self.missed += 1
            self.probe_at = time.monotonic() + backoff(self.missed)
            if self.missed >= PROBES:
                self.lose(f"{self.suspicion}; missed {self.missed} health probes in a row")

    def probe_is_due(self) -> bool:
        """True to one of the callers that ask at the same time."""
        with self.lock:
            due = self.cause is None and time.monotonic() >= self.probe_at
            if due:
                self.probe_at = math.inf
            return due


def probe(slots: Sequence[Slot]) -> None:
    """Ask all of these how they are, at once, within 10 s."""
    for slot, said in zip(slots, each(slots, lambda engine: engine.health(), HEALTH_S), strict=True):
        if isinstance(said, WrongModelError):
            raise said
        slot.probed(said)


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
    end = math.inf if limit_s is None else time.monotonic() + limit_s
    for thread in threads:
        thread.join(None if end == math.inf else max(0.0, end - time.monotonic()))
    return list(outcomes)


def cause_of(error: BaseException) -> str:
    """The message; of an error that is none of an engine's, its type too."""
    return str(error) if isinstance(error, EngineError) and str(error) else f"{type(error).__name__}: {error}"


def is_refusal(outcome: Any) -> bool:
    return isinstance(outcome, EngineError) and not isinstance(outcome, (EngineBusyError, EngineLostError, WrongModelError))


def health_of(engine: RolloutEngine) -> Health:
    """What it says; SUSPECT for one that cannot."""
    try:
        said = engine.health()
    except Exception:
        return Health.SUSPECT
    return said if isinstance(said, Health) else Health.SUSPECT
