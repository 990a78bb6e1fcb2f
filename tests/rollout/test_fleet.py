"""A fleet shares out requests, asks only those who can answer, and tells all of them the same.  Engines are fakes: see fake_engine.py."""

import threading
import time

import pytest

from megatron_plugin.rollout import dispatch, slots
from megatron_plugin.rollout.engine import EngineError, Health, WrongModelError
from megatron_plugin.rollout.fleet import Fleet
from tests.rollout.fake_engine import SOON_S, FakeEngine, answers_match, requests


@pytest.mark.parametrize("engines", [1, 3])
def test_all_engines_well(fleet_of, engines):
    fakes = [FakeEngine(f"e{i}", delay_s=0.01) for i in range(engines)]
    generated = fleet_of(*fakes, timeout_s=30).generate(requests(40))
    assert len(generated.completions) == 40 and not (generated.refused or generated.missing or generated.lost)
    answers_match(generated)
    assert (generated.retried, generated.late, generated.tokens) == (0, 0, 40 * 2 * 3)
    assert sum(len(fake.prompts) for fake in fakes) == 40, "something was asked twice"


def test_no_requests_no_work(fleet_of):
    assert fleet_of(FakeEngine()).generate([]).completions == {}


def test_the_slow_engine_gets_less_and_none_more_than_its_share(fleet_of):
    fast, slow = FakeEngine("fast", delay_s=0.005), FakeEngine("slow", delay_s=0.2)
    generated = fleet_of(slow, fast, timeout_s=30, concurrency=2).generate(requests(40))
    assert len(generated.completions) == 40
    assert len(slow.prompts) < 20 < len(fast.prompts), f"{len(slow.prompts)} and {len(fast.prompts)}: not by load"
    assert slow.most_in_flight <= 2 and fast.most_in_flight <= 2


def test_an_idle_fleet_is_filled_evenly(fleet_of):
    """Many leaders ask for a handful of prompts: they must not all go to the first engine."""
    engines = [FakeEngine(f"e{i}", delay_s=0.3) for i in range(4)]
    fleet_of(*engines, timeout_s=30).generate(requests(8))
    assert [len(engine.prompts) for engine in engines] == [2, 2, 2, 2]


@pytest.fixture
def at_once():
    """Starts a call in a thread, as the trainer does for the step ahead; returns its result when asked for."""
    threads = []

    def start(fleet, asked):
        found = []
        threads.append(threading.Thread(target=lambda: found.append(fleet.generate(asked))))
        threads[-1].start()
        return lambda: threads[-1].join() or found[0]

    yield start
    for thread in threads:
        thread.join()


def _until_asked(engine, count):
    end = time.monotonic() + SOON_S
    while engine.in_flight < count and time.monotonic() < end:
        time.sleep(0.005)


@pytest.mark.parametrize("engines", [1, 2])
def test_two_calls_at_once_share_the_engines(fleet_of, at_once, engines, monkeypatch):
    """All places are taken by the other call when the second begins: it waits for one, and is woken, not only looks now and then."""
    monkeypatch.setattr(dispatch, "POLL_S", 30.0)
    fakes = [FakeEngine(f"e{i}", delay_s=0.1) for i in range(engines)]
    fleet = fleet_of(*fakes, timeout_s=60, concurrency=2)
    other = at_once(fleet, requests(8))
    _until_asked(fakes[0], 2)
    begin = time.monotonic()
    generated = fleet.generate(requests(9))
    for result, count in ((generated, 9), (other(), 8)):
        assert len(result.completions) == count and not (result.missing or result.lost), result.missing
        answers_match(result)
    assert time.monotonic() - begin < SOON_S and all(fake.most_in_flight == 2 for fake in fakes)


@pytest.mark.parametrize("fault", ["hang", "die", "closed"])
def test_an_engine_that_is_lost_while_a_call_waits_for_a_place(fleet_of, at_once, fault, monkeypatch):
    monkeypatch.setattr(dispatch, "POLL_S", 0.5 if fault == "closed" else 30.0)
    fake = FakeEngine(faults=dict.fromkeys(range(4), "die" if fault == "die" else "hang"), delay_s=0.3)
    fleet = fleet_of(fake, concurrency=1, timeout_s=0.5 if fault == "hang" else 30)
    other = at_once(fleet, requests(1))
    _until_asked(fake, 1)
    if fault == "closed":
        threading.Timer(0.1, fleet.close).start()
    begin = time.monotonic()
    generated = fleet.generate(requests(3))
    cause = {"hang": "no answer within 0.5 s", "die": "connection reset", "closed": "the fleet was closed"}[fault]
    assert len(generated.missing) == 3 and cause in generated.missing["k0"] and time.monotonic() - begin < SOON_S
    assert len(fake.prompts) <= (3 if fault == "hang" else 1) and len(other().completions) == 0


def test_a_refused_prompt_is_neither_retried_nor_fatal(fleet_of):
    engines = [FakeEngine(f"e{i}", faults={(3, 7): "refuse"}) for i in range(2)]
    generated = fleet_of(*engines).generate(requests(6))
    assert list(generated.refused) == ["k2"] and "leaves no room" in generated.refused["k2"] and len(generated.completions) == 5
    assert sum(engine.prompts.count((3, 7)) for engine in engines) == 1 and not generated.lost


def test_another_model_ends_the_run(fleet_of):
    with pytest.raises(WrongModelError, match="another model"):
        fleet_of(FakeEngine(faults={2: "other"})).generate(requests(5))


def test_empty_completions_are_kept_and_counted(fleet_of):
    generated = fleet_of(FakeEngine(faults={(1, 7): "empty"})).generate(requests(2))
    assert [c.token_ids for c in generated.completions["k0"]] == [(), ()] and generated.tokens == 6


def test_no_healthy_engine_costs_no_time(fleet_of):
    dead, stale = FakeEngine("dead"), FakeEngine("stale", version=None)
    dead.state = Health.DEAD
    begin = time.monotonic()
    generated = fleet_of(dead, stale, timeout_s=60).generate(requests(3))
    assert len(generated.missing) == 3 and time.monotonic() - begin < SOON_S and not stale.prompts
    assert "dead: found dead" in generated.missing["k0"] and "stale: has no complete new weights" in generated.missing["k0"]
    assert generated.lost == {"dead": "found dead"}


def test_engines_with_older_weights_are_not_asked(fleet_of):
    old, new = FakeEngine("old", version=3), FakeEngine("new", version=4)
    generated = fleet_of(old, new).generate(requests(8))
    assert not old.prompts and {c.weight_version for group in generated.completions.values() for c in group} == {4}


@pytest.mark.parametrize("fault", ["hang", "bug"])
def test_an_engine_whose_health_fails_is_suspect_and_in_the_end_dead(fleet_of, fault, monkeypatch, caplog):
    """Three probes; the call does without it, and it is logged once how it went."""
    monkeypatch.setattr(slots, "HEALTH_S", 0.1)
    ill, well = FakeEngine("ill", faults={"health": fault}), FakeEngine("well", delay_s=1.0)
    fleet = fleet_of(ill, well, timeout_s=30)
    assert fleet.health() == {"ill": Health.SUSPECT, "well": Health.HEALTHY} == fleet.states()
    generated = fleet.generate(requests(3))
    assert len(generated.completions) == 3 and not ill.prompts and fleet.health() == {"ill": Health.DEAD, "well": Health.HEALTHY}
    assert ("no answer within 0.1 s" if fault == "hang" else "no route to host") in generated.lost["ill"]
    assert "missed 3 health probes in a row" in generated.lost["ill"]
    assert [said for said in ("SUSPECT", "DEAD", "answers again") for record in caplog.records if said in record.message] == ["SUSPECT", "DEAD"]


def test_words_for_all(fleet_of):
    a, b, dead = FakeEngine("a"), FakeEngine("b", faults={"wake": "die"}), FakeEngine("dead")
    fleet = fleet_of(a, b, dead)
    fleet.mark_lost(dead, "killed")
    fleet.sleep(2)
    fleet.wake()
    assert a.said == ["sleep 2", "wake"] and b.said == ["sleep 2"] and dead.said == []
    assert fleet.dead() == {"b": "b: connection reset", "dead": "killed"}


def test_a_word_that_is_refused_is_an_error_after_all_were_told(fleet_of):
    a, b = FakeEngine("a", faults={"sleep 1": "refuse"}), FakeEngine("b")
    with pytest.raises(EngineError, match="a cannot sleep 1"):
        fleet_of(a, b).sleep()
    assert b.said == ["sleep 1"]


MISTAKES = {
    "no engine": (lambda: Fleet([], timeout_s=1), r"names \[\], expected at least one"),
    "one name twice": (lambda: Fleet([FakeEngine(), FakeEngine()], timeout_s=1), "each under a name of its own"),
    "timeout": (lambda: Fleet([FakeEngine()], timeout_s=0), "timeout_s=0, .*expected seconds > 0"),
    "nan": (lambda: Fleet([FakeEngine()], timeout_s=float("nan")), "timeout_s=nan"),
    "concurrency": (lambda: Fleet([FakeEngine()], timeout_s=1, concurrency=0), "concurrency=0"),
    "one key twice": (lambda: Fleet([FakeEngine()], timeout_s=1).generate(requests(2) + requests(1)), "key 'k0' 2 times"),
    "unknown engine": (lambda: Fleet([FakeEngine()], timeout_s=1).mark_lost("fkae", "x"), "'fkae', expected one of fake"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    act, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        act()
