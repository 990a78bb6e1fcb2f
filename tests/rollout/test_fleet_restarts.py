"""DEAD engines come back, STALE until an update, as often as is allowed; close leaves none behind.  Engines are fakes: see fake_engine.py."""

import os
import signal
import threading
import time

import pytest

from megatron_plugin.rollout.engine import EngineLostError, Health
from tests.rollout.fake_engine import SOON_S, FakeEngine, answers_match, keys_once, requests, update


def test_restart_and_update_bring_an_engine_back(fleet_of):
    engine = FakeEngine(faults={1: "die"})
    fleet = fleet_of(engine, concurrency=1)
    first = fleet.generate(requests(4))
    assert list(first.completions) == ["k0"] and fleet.health() == {"fake": Health.DEAD}
    assert fleet.restart_dead() == ["fake"] and fleet.dead() == {} and fleet.health() == {"fake": Health.STALE}
    assert len(fleet.generate(requests(4)).missing) == 4, "a restarted engine generated before an update"
    update(fleet.engines, 2)
    again = fleet.generate([request for request in requests(4) if request.key in first.missing])
    assert sorted(again.completions) == ["k1", "k2", "k3"]
    answers_match(again, version=2)


def test_a_failing_restart_is_tried_again(fleet_of):
    engine = FakeEngine(restart_fails=2)
    fleet = fleet_of(engine, max_restarts=3)
    fleet.mark_lost(engine, "lost in an update")
    assert fleet.dead() == {"fake": "lost in an update"} and fleet.restart_dead() == ["fake"] and engine.restarts == 3


def test_restarts_come_to_an_end(fleet_of):
    engines = [FakeEngine(f"e{i}", restart_fails=99) for i in range(2)]
    fleet = fleet_of(*engines, max_restarts=2)
    for engine in engines:
        fleet.mark_lost(engine.name, "killed")
    with pytest.raises(EngineLostError, match=r"restarted 2 times.*e0: killed; restart 1 failed: .*out of memory; restart 2 failed.*e1: killed") as raised:
        fleet.restart_dead()
    assert raised.value.exit_code == 5 and [engine.restarts for engine in engines] == [2, 2]


def test_restarts_that_work_are_counted_too(fleet_of):
    engine = FakeEngine()
    fleet = fleet_of(engine, max_restarts=2)
    for _ in range(2):
        fleet.mark_lost(engine, "killed")
        assert fleet.restart_dead() == ["fake"]
    fleet.mark_lost(engine, "killed again")
    with pytest.raises(EngineLostError, match="killed again"):
        fleet.restart_dead()


def test_the_others_go_on_without_an_engine_that_stays_away(fleet_of):
    gone, well = FakeEngine("gone", restart_fails=99), FakeEngine("well")
    fleet = fleet_of(gone, well, max_restarts=2)
    fleet.mark_lost(gone, "node lost")
    assert [fleet.restart_dead() for _ in range(4)] == [[], [], [], []] and gone.restarts == 2
    assert len(fleet.generate(requests(3)).completions) == 3 and "node lost" in fleet.dead()["gone"]


def test_restarts_run_at_once(fleet_of):
    both = threading.Barrier(2, timeout=SOON_S)  # broken, and with it the restart, unless both are inside together

    class Slow(FakeEngine):
        def restart(self):
            both.wait()
            super().restart()

    fleet = fleet_of(Slow("a"), Slow("b"), max_restarts=1)
    fleet.mark_lost("a", "x")
    fleet.mark_lost("b", "x")
    assert sorted(fleet.restart_dead()) == ["a", "b"]


def test_close_during_a_restart_leaves_no_engine_behind(fleet_of):
    class Restarted(FakeEngine):
        def restart(self):
            fleet.close()
            super().restart()

    engine = Restarted()
    fleet = fleet_of(engine)
    fleet.mark_lost(engine, "killed")
    with pytest.raises(EngineLostError, match="closed while"):
        fleet.restart_dead()
    assert engine.closes == 2


def test_close_twice_and_with_an_engine_that_cannot(fleet_of):
    a, b = FakeEngine("a", faults={"close": "bug"}), FakeEngine("b")
    fleet = fleet_of(a, b)
    assert fleet.close() == {"a": "OSError: no such process"} and fleet.close() == {}
    assert (a.closes, b.closes) == (1, 1)
    with pytest.raises(ValueError, match="closed"):
        fleet.generate(requests(1))


def test_close_from_a_signal_handler_ends_a_running_call(fleet_of):
    """As SIGTERM does: the handler runs in the midst of generate, in the same thread."""
    engines = [FakeEngine("hanging", faults={0: "hang"}), FakeEngine("hanging later", faults={2: "hang"})]  # no answer wakes the call
    fleet = fleet_of(*engines, timeout_s=60, concurrency=1)
    previous = signal.signal(signal.SIGUSR1, lambda *_: fleet.close())
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    begin = time.monotonic()
    try:
        generated = fleet.generate(requests(200))
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert time.monotonic() - begin < SOON_S and [engine.closes for engine in engines] == [1, 1]
    keys_once(generated, 200)
    assert generated.completions and set(generated.missing.values()) == {"the fleet was closed"}


def test_close_while_everything_is_locked(fleet_of):
    """A handler that waited for a lock of the thread it interrupted would wait for ever."""
    fleet = fleet_of(FakeEngine())
    with fleet._books.lock:
        assert fleet.close() == {}
