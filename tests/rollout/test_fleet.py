"""The fleet under failures: every request ends in exactly one place, soon, whatever the engines do.  Engines are fakes: see fake_engine.py."""

import os
import random
import signal
import threading
import time

import pytest

from megatron_plugin.rollout import fleet as fleet_module
from megatron_plugin.rollout.engine import EngineError, EngineLostError, Health, SamplingParams, WrongModelError
from megatron_plugin.rollout.fleet import Fleet, Request
from tests.rollout.fake_engine import FakeEngine, update

TIMEOUT_S = 1.0
SOON_S = 5.0  # where the answer should come at once: two busy cores


@pytest.fixture
def fleet_of():
    """A fleet of these engines; whatever hangs is let go at the end."""
    made = []

    def make(*engines, timeout_s=TIMEOUT_S, **options):
        made.extend(engines)
        return Fleet(engines, timeout_s=timeout_s, **options)

    yield make
    for engine in made:
        engine.release.set()


def _requests(count, *, n=2):
    return [Request(f"k{i}", (i + 1, 7), SamplingParams(n=n, max_tokens=4)) for i in range(count)]


def _keys_once(generated, count):
    found = [*generated.completions, *generated.refused, *generated.missing]
    assert sorted(found) == sorted(f"k{i}" for i in range(count)), "a request was lost or ended in two places"


def _answers_match(generated, version=1, n=2):
    for key, completions in generated.completions.items():
        assert [c.token_ids for c in completions] == [(version, int(key[1:]) + 8, index) for index in range(n)], f"{key} got another's answer"


@pytest.mark.parametrize("engines", [1, 3])
def test_all_engines_well(fleet_of, engines):
    fakes = [FakeEngine(f"e{i}", delay_s=0.01) for i in range(engines)]
    generated = fleet_of(*fakes, timeout_s=30).generate(_requests(40))
    assert len(generated.completions) == 40 and not (generated.refused or generated.missing or generated.lost)
    _answers_match(generated)
    assert (generated.retried, generated.late, generated.empty, generated.tokens) == (0, 0, 0, 40 * 2 * 3) and generated.seconds > 0
    assert sum(len(fake.prompts) for fake in fakes) == 40, "something was asked twice"


def test_no_requests_no_work(fleet_of):
    assert fleet_of(FakeEngine()).generate([]).completions == {}


def test_the_slow_engine_gets_less_and_none_more_than_its_share(fleet_of):
    fast, slow = FakeEngine("fast", delay_s=0.005), FakeEngine("slow", delay_s=0.2)
    generated = fleet_of(slow, fast, timeout_s=30, concurrency=2).generate(_requests(40))
    assert len(generated.completions) == 40
    assert len(slow.prompts) < 20 < len(fast.prompts), f"{len(slow.prompts)} and {len(fast.prompts)}: not by load"
    assert slow.most_in_flight <= 2 and fast.most_in_flight <= 2


def test_an_idle_fleet_is_filled_evenly(fleet_of):
    """Many leaders ask for a handful of prompts: they must not all go to the first engine."""
    engines = [FakeEngine(f"e{i}", delay_s=0.3) for i in range(4)]
    fleet_of(*engines, timeout_s=30).generate(_requests(8))
    assert [len(engine.prompts) for engine in engines] == [2, 2, 2, 2]


@pytest.mark.parametrize("fault", ["die", "short", "old", "nothing", "bug"])
def test_a_lost_engines_requests_are_asked_elsewhere(fleet_of, fault):
    broken, well = FakeEngine("broken", faults={3: fault}, delay_s=0.02), FakeEngine("well", delay_s=0.02)
    fleet = fleet_of(broken, well, timeout_s=30, concurrency=4)
    generated = fleet.generate(_requests(30))
    assert len(generated.completions) == 30
    _answers_match(generated)
    assert set(generated.lost) == set(fleet.dead()) == {"broken"} and generated.retried >= 1
    assert fleet.health() == {"broken": Health.DEAD, "well": Health.HEALTHY} and fleet.engines == [well]
    expected = {"die": "connection reset", "short": "1 completions, expected 2", "old": "weights 0, expected 1", "nothing": "NoneType", "bug": "KeyError"}
    assert expected[fault] in generated.lost["broken"]
    asked = len(broken.prompts)
    fleet.generate(_requests(4))
    assert len(broken.prompts) == asked, "a DEAD engine was asked again"


def test_an_engine_that_hangs_beyond_its_deadline(fleet_of):
    hanging, well = FakeEngine("hanging", faults={0: "hang"}), FakeEngine("well", delay_s=0.01)
    begin = time.monotonic()
    generated = fleet_of(hanging, well).generate(_requests(20))
    assert len(generated.completions) == 20 and TIMEOUT_S <= time.monotonic() - begin < TIMEOUT_S + SOON_S
    assert "no answer within 1 s" in generated.lost["hanging"]


def test_a_late_answer_is_thrown_away_and_counted(fleet_of):
    late, well = FakeEngine("late", faults={0: "late", 1: "late"}), FakeEngine("well")
    fleet = fleet_of(late, well, concurrency=2)
    first = fleet.generate(_requests(4))
    assert len(first.completions) == 4 and len(late.prompts) == 2 and first.retried == 2 and first.late == 0
    late.release.set()  # now both answer
    end = time.monotonic() + SOON_S
    while late.in_flight and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    second = fleet.generate(_requests(4))
    assert second.late == 2 and len(second.completions) == 4 and fleet.generate([]).late == 0


def test_a_late_answer_within_the_call(fleet_of):
    """The engine is given up for one request; its answer to another comes while the call still waits elsewhere."""
    late, slow = FakeEngine("late", faults={0: "late"}), FakeEngine("slow", delay_s=0.5)
    threading.Timer(TIMEOUT_S + 0.3, late.release.set).start()
    generated = fleet_of(late, slow, concurrency=1).generate(_requests(4))
    assert len(generated.completions) == 4 and generated.late == 1
    _answers_match(generated)


def test_a_refused_prompt_is_neither_retried_nor_fatal(fleet_of):
    engines = [FakeEngine(f"e{i}", faults={(3, 7): "refuse"}) for i in range(2)]
    generated = fleet_of(*engines).generate(_requests(6))
    assert list(generated.refused) == ["k2"] and "leaves no room" in generated.refused["k2"] and len(generated.completions) == 5
    assert sum(engine.prompts.count((3, 7)) for engine in engines) == 1 and not generated.lost


def test_an_engine_that_went_stale_is_not_taken_for_a_refusal(fleet_of):
    """A server that its supervisor restarted refuses every prompt: none of them is to blame."""
    stale, well = FakeEngine("stale", faults={2: "stale"}, delay_s=0.02), FakeEngine("well", delay_s=0.02)
    generated = fleet_of(stale, well, concurrency=2).generate(_requests(12))
    assert len(generated.completions) == 12 and not generated.refused and "has no weights" in generated.lost["stale"]


def test_another_model_ends_the_run(fleet_of):
    with pytest.raises(WrongModelError, match="another model"):
        fleet_of(FakeEngine(faults={2: "other"})).generate(_requests(5))


def test_empty_completions_are_kept_and_counted(fleet_of):
    generated = fleet_of(FakeEngine(faults={(1, 7): "empty"})).generate(_requests(2))
    assert [c.token_ids for c in generated.completions["k0"]] == [(), ()] and generated.empty == 2 and generated.tokens == 6


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_all_engines_lost(fleet_of, fault):
    engines = [FakeEngine(f"e{i}", faults={2: fault}, delay_s=0.01) for i in range(2)]
    begin = time.monotonic()
    generated = fleet_of(*engines, concurrency=1).generate(_requests(30))
    assert time.monotonic() - begin < (2 * TIMEOUT_S if fault == "hang" else 0) + SOON_S
    _keys_once(generated, 30)
    assert len(generated.completions) == 4 and len(generated.missing) == 26
    assert all("e0: " in cause and "e1: " in cause for cause in generated.missing.values())


def test_no_healthy_engine_costs_no_time(fleet_of):
    dead, stale = FakeEngine("dead"), FakeEngine("stale", version=None)
    dead.state = Health.DEAD
    begin = time.monotonic()
    generated = fleet_of(dead, stale, timeout_s=60).generate(_requests(3))
    assert len(generated.missing) == 3 and time.monotonic() - begin < SOON_S and not stale.prompts
    assert "dead: found dead" in generated.missing["k0"] and "stale: has no complete new weights" in generated.missing["k0"]
    assert generated.lost == {"dead": "found dead"}


def test_engines_with_older_weights_are_not_asked(fleet_of):
    old, new = FakeEngine("old", version=3), FakeEngine("new", version=4)
    generated = fleet_of(old, new).generate(_requests(8))
    assert not old.prompts and {c.weight_version for group in generated.completions.values() for c in group} == {4}


def test_a_prompt_that_kills_engines_does_not_kill_them_all(fleet_of):
    engines = [FakeEngine(f"e{i}", faults={(2, 7): "die"}, delay_s=0.01) for i in range(5)]
    generated = fleet_of(*engines, timeout_s=30, concurrency=1).generate(_requests(30))
    _keys_once(generated, 30)
    assert len(generated.lost) == 3 and list(generated.missing) == ["k1"] and "asked of 3 engines" in generated.missing["k1"]


@pytest.mark.parametrize("fault", ["hang", "bug"])
def test_an_engine_whose_health_fails_is_dead(fleet_of, fault, monkeypatch):
    monkeypatch.setattr(fleet_module, "HEALTH_S", 0.3)
    fleet = fleet_of(FakeEngine("ill", faults={"health": fault}), FakeEngine("well"))
    generated = fleet.generate(_requests(3))
    assert len(generated.completions) == 3 and fleet.health() == {"ill": Health.DEAD, "well": Health.HEALTHY}
    assert ("no answer within 0.3 s" if fault == "hang" else "no route to host") in generated.lost["ill"]


@pytest.mark.parametrize("seed", range(8))
def test_random_deaths_lose_and_double_nothing(fleet_of, seed):
    """200 requests, 3 engines, random faults, restarts and updates in between, until all is answered."""
    rng = random.Random(seed)
    kinds = ["die", "die", "bug", "short", "old", "stale", "late"]
    engines = [FakeEngine(f"e{i}", delay_s=0.002, faults={rng.randrange(120): rng.choice(kinds) for _ in range(3)}) for i in range(3)]
    for engine in engines:
        engine.faults[(rng.randrange(200) + 1, 7)] = "refuse"
    fleet, version = fleet_of(*engines, timeout_s=1.0, concurrency=8, max_restarts=20), 1
    wanted, answers, refused = {request.key: request for request in _requests(200)}, {}, {}
    for _ in range(12):
        generated = fleet.generate(wanted.values())
        assert sorted([*generated.completions, *generated.refused, *generated.missing]) == sorted(wanted)
        _answers_match(generated, version)
        assert not set(generated.completions) & set(answers), "answered twice"
        answers |= generated.completions
        refused |= generated.refused
        wanted = {key: wanted[key] for key in generated.missing}
        if not wanted:
            break
        fleet.restart_dead()
        version += 1
        update(fleet.engines, version)
    assert len(answers) + len(refused) == 200 and not wanted and set(refused) <= {f"k{i}" for i in range(200)} and len(refused) <= 3


def test_restart_and_update_bring_an_engine_back(fleet_of):
    engine = FakeEngine(faults={1: "die"})
    fleet = fleet_of(engine, concurrency=1)
    first = fleet.generate(_requests(4))
    assert list(first.completions) == ["k0"] and fleet.health() == {"fake": Health.DEAD}
    assert fleet.restart_dead() == ["fake"] and fleet.dead() == {} and fleet.health() == {"fake": Health.STALE}
    assert len(fleet.generate(_requests(4)).missing) == 4, "a restarted engine generated before an update"
    update(fleet.engines, 2)
    again = fleet.generate([request for request in _requests(4) if request.key in first.missing])
    assert sorted(again.completions) == ["k1", "k2", "k3"]
    _answers_match(again, version=2)


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
    assert len(fleet.generate(_requests(3)).completions) == 3 and "node lost" in fleet.dead()["gone"]


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


def test_an_engine_marked_lost_in_the_midst_of_a_call(fleet_of):
    late, well = FakeEngine("late", faults={0: "late"}), FakeEngine("well", delay_s=0.2)
    fleet = fleet_of(late, well, timeout_s=30, concurrency=1)
    threading.Timer(0.1, lambda: (fleet.mark_lost(late, "lost elsewhere"), late.release.set())).start()
    generated = fleet.generate(_requests(3))
    assert len(generated.completions) == 3 and generated.late == 1 and generated.lost == {"late": "lost elsewhere"}


def test_words_for_all(fleet_of):
    a, b, dead = FakeEngine("a"), FakeEngine("b", faults={"wake": "die"}), FakeEngine("dead")
    fleet = fleet_of(a, b, dead)
    fleet.mark_lost(dead, "killed")
    fleet.sleep(2)
    fleet.wake()
    fleet.pause()
    fleet.resume()
    assert a.said == ["sleep 2", "wake", "pause", "resume"] and b.said == ["sleep 2"] and dead.said == []
    assert fleet.dead() == {"b": "b: connection reset", "dead": "killed"}


def test_a_word_that_is_refused_is_an_error_after_all_were_told(fleet_of):
    a, b = FakeEngine("a", faults={"pause": "refuse"}), FakeEngine("b")
    with pytest.raises(EngineError, match="a cannot pause"):
        fleet_of(a, b).pause()
    assert b.said == ["pause"]


def test_close_twice_and_with_an_engine_that_cannot(fleet_of):
    a, b = FakeEngine("a", faults={"close": "bug"}), FakeEngine("b")
    fleet = fleet_of(a, b)
    assert fleet.close() == {"a": "OSError: no such process"} and fleet.close() == {}
    assert (a.closes, b.closes) == (1, 1)
    with pytest.raises(ValueError, match="closed"):
        fleet.generate(_requests(1))


def test_close_from_a_signal_handler_ends_a_running_call(fleet_of):
    """As SIGTERM does: the handler runs in the midst of generate, in the same thread."""
    engines = [FakeEngine("hanging", faults={0: "hang"}), FakeEngine("slow", delay_s=0.05)]
    fleet = fleet_of(*engines, timeout_s=60, concurrency=1)
    previous = signal.signal(signal.SIGUSR1, lambda *_: fleet.close())
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    begin = time.monotonic()
    try:
        generated = fleet.generate(_requests(200))
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert time.monotonic() - begin < SOON_S and [engine.closes for engine in engines] == [1, 1]
    _keys_once(generated, 200)
    assert generated.completions and set(generated.missing.values()) == {"the fleet was closed"}


def test_close_while_everything_is_locked(fleet_of):
    """A handler that waited for a lock of the thread it interrupted would wait for ever."""
    fleet = fleet_of(FakeEngine())
    with fleet._books.lock:
        assert fleet.close() == {}


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


MISTAKES = {
    "no engine": (lambda: Fleet([], timeout_s=1), r"names \[\], expected at least one"),
    "one name twice": (lambda: Fleet([FakeEngine(), FakeEngine()], timeout_s=1), "each under a name of its own"),
    "timeout": (lambda: Fleet([FakeEngine()], timeout_s=0), "timeout_s=0, .*expected seconds > 0"),
    "nan": (lambda: Fleet([FakeEngine()], timeout_s=float("nan")), "timeout_s=nan"),
    "concurrency": (lambda: Fleet([FakeEngine()], timeout_s=1, concurrency=0), "concurrency=0"),
    "one key twice": (lambda: Fleet([FakeEngine()], timeout_s=1).generate(_requests(2) + _requests(1)), "key 'k0' 2 times"),
    "unknown engine": (lambda: Fleet([FakeEngine()], timeout_s=1).mark_lost("fkae", "x"), "'fkae', expected one of fake"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    act, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        act()
