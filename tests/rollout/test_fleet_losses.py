"""Engines that die, hang, answer late or wrongly: every request ends in exactly one place, soon.  Engines are fakes: see fake_engine.py."""

import random
import threading
import time

import pytest

from megatron_plugin.rollout import dispatch, slots
from megatron_plugin.rollout.engine import Health
from tests.rollout.fake_engine import SOON_S, TIMEOUT_S, FakeEngine, answers_match, keys_once, requests, update


@pytest.mark.parametrize("fault", ["die", "short", "old", "nothing", "bug"])
def test_a_lost_engines_requests_are_asked_elsewhere(fleet_of, fault):
    broken, well = FakeEngine("broken", faults={3: fault}, delay_s=0.02), FakeEngine("well", delay_s=0.02)
    fleet = fleet_of(broken, well, timeout_s=30, concurrency=4)
    generated = fleet.generate(requests(30))
    assert len(generated.completions) == 30
    answers_match(generated)
    assert set(generated.lost) == set(fleet.dead()) == {"broken"} and generated.retried >= 1
    assert fleet.health() == {"broken": Health.DEAD, "well": Health.HEALTHY} and fleet.engines == [well]
    expected = {"die": "connection reset", "short": "1 completions, expected 2", "old": "weights 0, expected 1", "nothing": "NoneType", "bug": "KeyError"}
    assert expected[fault] in generated.lost["broken"]
    asked = len(broken.prompts)
    fleet.generate(requests(4))
    assert len(broken.prompts) == asked, "a DEAD engine was asked again"


def test_an_engine_that_hangs_beyond_its_deadline(fleet_of):
    """SUSPECT the first time, DEAD the second."""
    hanging, well = FakeEngine("hanging", faults={0: "hang", 1: "hang"}), FakeEngine("well", delay_s=0.01)
    begin = time.monotonic()
    generated = fleet_of(hanging, well, concurrency=2).generate(requests(20))
    assert len(generated.completions) == 20 and TIMEOUT_S <= time.monotonic() - begin < TIMEOUT_S + SOON_S
    assert f"no answer within {TIMEOUT_S:g} s, for 2 requests without an answer between" in generated.lost["hanging"]


def test_an_engine_that_misses_one_deadline_is_suspect_until_it_answers(fleet_of, caplog):
    slow, well = FakeEngine("slow", faults={0: "hang"}), FakeEngine("well", delay_s=0.01)
    fleet = fleet_of(slow, well, concurrency=1)
    generated = fleet.generate(requests(20))
    assert len(generated.completions) == 20 and not generated.lost and (generated.suspected, generated.retried) == (1, 1)
    fleet.health()
    fleet.generate(requests(6))
    assert len(slow.prompts) > 1 and fleet.states()["slow"] is Health.HEALTHY, "it was never asked again"
    assert [record.message for record in caplog.records] == [
        f"rollout engine slow is SUSPECT: no answer within {TIMEOUT_S:g} s", "rollout engine slow answers again"
    ]  # fmt: skip


def test_a_prompt_that_always_takes_too_long_is_refused(fleet_of):
    """After three deadlines.  It is to blame, not the engine, which answers all others."""
    engine = FakeEngine(faults={(2, 7): "hang"}, delay_s=0.02)
    generated = fleet_of(engine, concurrency=2).generate(requests(6))
    assert sorted(generated.completions) == ["k0", "k2", "k3", "k4", "k5"] and not generated.lost and engine.prompts.count((2, 7)) == 3
    assert "asked as often as allowed, the last time: no answer within" in generated.refused["k1"]


@pytest.mark.parametrize("fault", ["busy", "cut"])
def test_what_failed_on_the_way_is_asked_again(fleet_of, fault):
    """Twice, then it works; and for ever, which is refused after six times in all.  The engine lives and is not lost."""
    engine = FakeEngine(faults={0: fault, 1: fault, (3, 7): fault}, delay_s=0.01)
    generated = fleet_of(engine, timeout_s=30, concurrency=2).generate(requests(4))
    assert sorted(generated.completions) == ["k0", "k1", "k3"] and not generated.lost and not generated.missing
    assert "asked as often as allowed" in generated.refused["k2"] and engine.prompts.count((3, 7)) == 6
    assert generated.retried == 2 + 5
    answers_match(generated)


def test_waits_double_up_to_30_seconds_and_differ(monkeypatch):
    monkeypatch.setattr(slots, "BACKOFF_S", 1.0)
    for tries in range(1, 12):
        waits = [slots.backoff(tries) for _ in range(200)]
        assert min(30.0, 0.5 * 2 ** (tries - 1)) <= min(waits) and max(waits) <= min(30.0, 1.5 * 2 ** (tries - 1))
        assert len(set(waits)) > 1 or min(waits) == 30.0
    assert sum(1.5 * 2**n for n in range(dispatch.RETRIES)) < 60 and dispatch.RETRIES == 5


def test_an_engine_that_stays_silent_is_probed_and_then_dead(fleet_of):
    """No answer and no answer to probes either: as a machine that lost its network.  What it was asked waits, and is asked elsewhere."""
    silent, well = FakeEngine("silent", faults={0: "silent"}), FakeEngine("well", delay_s=0.05)
    fleet = fleet_of(silent, well, timeout_s=30, concurrency=2)
    generated = fleet.generate(requests(30))
    keys_once(generated, 30)
    assert len(generated.completions) == 30 and "missed 3 health probes in a row" in generated.lost["silent"] and generated.suspected == 1
    alone = FakeEngine("alone", faults={0: "silent"})
    generated = fleet_of(alone, timeout_s=30, concurrency=1).generate(requests(3))
    assert sorted(generated.missing) == ["k0", "k1", "k2"] and not generated.completions


def test_closed_while_requests_wait_to_be_asked_again(fleet_of, monkeypatch):
    fleet = fleet_of(FakeEngine(faults={0: "busy", 1: "cut"}))
    monkeypatch.setattr(slots, "BACKOFF_S", 20.0)
    threading.Timer(0.4, fleet.close).start()
    generated = fleet.generate(requests(5))
    keys_once(generated, 5)
    assert len(generated.completions) == 3 and set(generated.missing.values()) == {"the fleet was closed"}


def test_a_late_answer_is_thrown_away_and_counted(fleet_of):
    late, well = FakeEngine("late", faults={0: "late", 1: "late"}), FakeEngine("well")
    fleet = fleet_of(late, well, concurrency=2)
    first = fleet.generate(requests(4))
    assert len(first.completions) == 4 and len(late.prompts) == 2 and first.retried == 2 and first.late == 0
    late.release.set()  # now both answer
    _wait_for_late(fleet, 2)
    second = fleet.generate(requests(4))
    assert second.late == 2 and len(second.completions) == 4 and fleet.generate([]).late == 0


def test_a_late_answer_within_the_call(fleet_of):
    """The engine that was given up answers while its requests are with another one."""
    late = FakeEngine("late", faults={0: "late", 1: "late"})

    class Second(FakeEngine):
        def _answer(self, fault, prompt_ids, params):
            if tuple(prompt_ids) in late.prompts:
                late.release.set()
                _wait_for_late(fleet, 2)
            return super()._answer(fault, prompt_ids, params)

    fleet = fleet_of(late, Second("second"), concurrency=2)
    generated = fleet.generate(requests(4))
    assert len(generated.completions) == 4 and generated.late == generated.retried == 2
    answers_match(generated)


def _wait_for_late(fleet, count):
    end = time.monotonic() + SOON_S
    while fleet._books.late < count and time.monotonic() < end:
        time.sleep(0.01)


def test_an_engine_marked_lost_in_the_midst_of_a_call(fleet_of):
    late, well = FakeEngine("late", faults={0: "late"}), FakeEngine("well", delay_s=0.2)
    fleet = fleet_of(late, well, timeout_s=30, concurrency=1)
    threading.Timer(0.1, lambda: (fleet.mark_lost(late, "lost elsewhere"), late.release.set())).start()
    generated = fleet.generate(requests(3))
    assert len(generated.completions) == 3 and generated.late == 1 and generated.lost == {"late": "lost elsewhere"}
    fleet.mark_lost(late, "the update failed")
    assert fleet.dead() == {"late": "lost elsewhere"}, "the first cause explains the later ones"


def test_an_engine_that_went_stale_is_not_taken_for_a_refusal(fleet_of):
    """A server that its supervisor restarted refuses every prompt: none of them is to blame."""
    stale, well = FakeEngine("stale", faults={2: "stale"}, delay_s=0.02), FakeEngine("well", delay_s=0.02)
    generated = fleet_of(stale, well, concurrency=2).generate(requests(12))
    assert len(generated.completions) == 12 and not generated.refused and "has no weights" in generated.lost["stale"]


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_all_engines_lost(fleet_of, fault):
    engines = [FakeEngine(f"e{i}", faults={2: fault, 3: fault}, delay_s=0.01) for i in range(2)]
    begin = time.monotonic()
    generated = fleet_of(*engines, concurrency=1).generate(requests(30))
    assert time.monotonic() - begin < (3 * TIMEOUT_S if fault == "hang" else 0) + SOON_S
    keys_once(generated, 30)
    assert len(generated.completions) == 4 and len(generated.missing) == 26
    assert all("e0: " in cause and "e1: " in cause for cause in generated.missing.values())


def test_a_prompt_that_kills_engines_does_not_kill_them_all(fleet_of):
    engines = [FakeEngine(f"e{i}", faults={(2, 7): "die"}, delay_s=0.01) for i in range(5)]
    generated = fleet_of(*engines, timeout_s=30, concurrency=1).generate(requests(30))
    keys_once(generated, 30)
    assert len(generated.lost) == 3 and list(generated.missing) == ["k1"] and "asked of 3 engines" in generated.missing["k1"]


@pytest.mark.parametrize("seed", range(8))
def test_random_deaths_lose_and_double_nothing(fleet_of, seed):
    """200 requests, 3 engines, random faults, restarts and updates in between, until all is answered."""
    rng = random.Random(seed)
    kinds = ["die", "die", "bug", "short", "old", "stale", "late", "busy", "cut", "silent"]
    engines = [FakeEngine(f"e{i}", delay_s=0.002, faults={rng.randrange(120): rng.choice(kinds) for _ in range(3)}) for i in range(3)]
    for engine in engines:
        engine.faults[(rng.randrange(200) + 1, 7)] = "refuse"
    fleet, version = fleet_of(*engines, timeout_s=1.0, concurrency=8, max_restarts=20), 1
    wanted, answers, refused = {request.key: request for request in requests(200)}, {}, {}
    for _ in range(12):
        generated = fleet.generate(wanted.values())
        assert sorted([*generated.completions, *generated.refused, *generated.missing]) == sorted(wanted)
        answers_match(generated, version)
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
