"""Engines that die, hang, answer late or wrongly: every request ends in exactly one place, soon.  Engines are fakes: see fake_engine.py."""

import random
import threading
import time

import pytest

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
    hanging, well = FakeEngine("hanging", faults={0: "hang"}), FakeEngine("well", delay_s=0.01)
    begin = time.monotonic()
    generated = fleet_of(hanging, well).generate(requests(20))
    assert len(generated.completions) == 20 and TIMEOUT_S <= time.monotonic() - begin < TIMEOUT_S + SOON_S
    assert f"no answer within {TIMEOUT_S:g} s" in generated.lost["hanging"]


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
    """The engine that was given up answers while the request is with another one."""
    late = FakeEngine("late", faults={0: "late"})

    class Second(FakeEngine):
        def _answer(self, fault, prompt_ids, params):
            if [tuple(prompt_ids)] == late.prompts:
                late.release.set()
                _wait_for_late(fleet, 1)
            return super()._answer(fault, prompt_ids, params)

    fleet = fleet_of(late, Second("second"), concurrency=1)
    generated = fleet.generate(requests(2))
    assert len(generated.completions) == 2 and generated.late == generated.retried == 1
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
    engines = [FakeEngine(f"e{i}", faults={2: fault}, delay_s=0.01) for i in range(2)]
    begin = time.monotonic()
    generated = fleet_of(*engines, concurrency=1).generate(requests(30))
    assert time.monotonic() - begin < (2 * TIMEOUT_S if fault == "hang" else 0) + SOON_S
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
    kinds = ["die", "die", "bug", "short", "old", "stale", "late"]
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
