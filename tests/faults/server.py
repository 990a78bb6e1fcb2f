"""A server that goes wrong in 35 ways, at the first, a middle and the last request, always for one prompt, and while weights come.

Asked as the trainer asks: VLLMEngine, Fleet, rounds with restarts and updates until nothing is missing."""

import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

from megatron_plugin.rollout import slots, vllm_wire
from megatron_plugin.rollout.engine import EngineError, Health, SamplingParams
from megatron_plugin.rollout.fleet import Fleet, Request
from megatron_plugin.rollout.vllm_http import connect_engine
from megatron_plugin.rollout.vllm_model import ModelDescription
from tests.faults.promises import Case
from tests.rollout.bad_server import FAULTS, LOST, REFUSED, RETRIED, BadServer, tokens_of

PROMISE = ("whatever a server answers (35 kinds of fault), every prompt is answered or classified, none twice and none with another's answer; what failed "
           "on the way is asked again 5 times (1, 2, 4, 8, 16 s, give or take half, at most 30 s), data errors are not; requests in flight and memory stay "
           "bounded")  # fmt: skip
REQUESTS, N, PLACES = 12, 2, 4
POSITIONS = {"first": 0, "middle": 5, "last": REQUESTS - 1, "always": f"p{8 + 4}"}
TIMED = ("slow", "hangs", "dribbles")  # noticed by the clock alone; all others get time enough on a busy machine
CONTROL = ("/weight_info", "/pause", "/collective_rpc", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume")
WORST = {  # of a control route: (status, body) or what the connection does
    "500": (500, {"detail": "no"}), "503": (503, {"detail": "busy"}), "404": (404, {"detail": "Not Found"}), "a list": (200, [1]), "nothing": (200, None),
}  # fmt: skip


def cases(*, full: bool) -> list[Case]:
    if not full:
        return [Case("every kind in the middle", lambda path: every_kind("middle"), len(FAULTS)),
                Case("every kind while weights come", lambda path: while_weights_come(), len(CONTROL) * len(WORST))]  # fmt: skip
    found = [Case(f"{kind}, {position}", lambda path, at=(kind, position): one(*at), 1) for kind in FAULTS for position in POSITIONS]
    return [*found, Case("every kind while weights come", lambda path: while_weights_come(), len(CONTROL) * len(WORST)),
            Case("503 for ever, real waits", lambda path: real_waits(), 1), Case("all kinds at once", lambda path: all_at_once(), len(FAULTS))]  # fmt: skip


def every_kind(position: str) -> None:
    with ThreadPoolExecutor(6) as pool, patch.object(slots, "BACKOFF_S", 0.02):
        for kind, done in [(kind, pool.submit(_one, kind, position)) for kind in FAULTS]:
            try:
                done.result()
            except AssertionError as error:
                raise AssertionError(f"{kind}: {error}") from error


def one(kind: str, position: str) -> None:
    with patch.object(slots, "BACKOFF_S", 0.05):
        _one(kind, position)


def _one(kind: str, position: str) -> None:
    server = BadServer({POSITIONS[position]: kind})
    try:
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        found = rounds(server, timeout_s=1.0 if kind in TIMED else 30.0)
        always = position == "always"
        refused = {4} if always and kind not in LOST else set(found.refused)
        assert set(found.refused) == refused if always else len(found.refused) == (kind in REFUSED), f"refused: {found.refused}"
        assert found.lost == 0 or kind in (*LOST, *TIMED), f"lost {found.lost} engines"  # two deadlines missed in a row: of these kinds it may be
        assert found.lost > 0 or kind not in LOST, "an engine of other weights was not lost"
        assert found.retried > 0 if kind in RETRIED else found.retried == 0 or kind in LOST, f"asked again {found.retried} times"
        assert server.most_in_flight <= PLACES + (kind in (*TIMED, "endless")) * 6, f"{server.most_in_flight} in flight"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < 256, f"{grown:.0f} MiB more"
        assert time.monotonic() - begin < 60
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()


class Found:
    def __init__(self):
        self.answers, self.refused, self.lost, self.retried, self.rounds = {}, {}, 0, 0, 0


def rounds(server: BadServer, *, timeout_s: float, count: int = REQUESTS, give_up: int = 9) -> Found:
    """As Rollouts._complete does, until nothing is missing: AssertionError for an answer that is lost, double, another's, or of other weights."""
    engine, found, version = connect_engine(server.url, ModelDescription(vocab_size=320), start_timeout_s=5), Found(), 1
    fleet = Fleet([engine], timeout_s=timeout_s, concurrency=PLACES, max_restarts=give_up)
    wanted = {i: Request(i, (i + 1, 7), SamplingParams(n=N, max_tokens=8)) for i in range(count)}
    _update(engine, version)
    while wanted:
        found.rounds += 1
        generated = fleet.generate(wanted.values())
        told = [*generated.completions, *generated.refused, *generated.missing]
        assert sorted(told) == sorted(wanted), "a prompt was lost or ended in two places"
        assert not set(generated.completions) & set(found.answers), "a prompt was answered twice"
        for key, completions in generated.completions.items():
            assert [c.token_ids for c in completions] == [tokens_of((key + 1, 7), i) for i in range(N)], f"{key} got another's answer"
            assert {c.weight_version for c in completions} == {version}, "other weights"
        found.answers |= generated.completions
        found.refused |= generated.refused
        found.lost, found.retried = found.lost + len(generated.lost), found.retried + generated.retried
        wanted = {key: wanted[key] for key in generated.missing}
        if wanted:
            for number in [key for key in server.faults if server.faults[key] in LOST]:
                del server.faults[number]  # the server was restarted
            server.dead = False
            fleet.restart_dead()
            version += 1
            _update(engine, version)
    assert threading.active_count() < 200
    fleet.close()
    return found


def _update(engine, version: int) -> None:
    engine.begin_update(version)
    engine.push({"names": []})
    engine.finish_update()


def while_weights_come() -> None:
    """A fault of any control route: an EngineError, and nothing is generated until an update was whole."""
    with ThreadPoolExecutor(6) as pool, patch.object(vllm_wire, "CONTROL_S", 1.0):
        for done in [pool.submit(_control, path, *fault) for path in CONTROL for fault in WORST.items()]:
            done.result()


def _control(path: str, kind: str, answer) -> None:
    server = BadServer()
    try:
        engine = connect_engine(server.url, ModelDescription(vocab_size=320), start_timeout_s=5)
        _update(engine, 1)
        server.answers[path] = answer
        whole = answer[0] == 200 and path not in ("/weight_info", "/reset_prefix_cache", "/collective_rpc", "/finish_weight_update")  # read, or needed
        try:
            _update(engine, 2)
            assert whole, f"{path} {kind}: an update that failed passed for one"
        except EngineError:
            assert not whole, f"{path} {kind}"
            begun = path != "/weight_info"  # the first thing asked: nothing was begun
            assert engine.health() is (Health.STALE if begun else Health.HEALTHY), f"{path} {kind}: {engine.health()}"
            server.answers.clear()
            engine.abort_update()
            _update(engine, 3)
        answered = engine.generate([1, 7], SamplingParams(n=1, max_tokens=8), timeout_s=5)
        assert answered[0].weight_version == engine.weight_version
        engine.close()
    finally:
        server.shutdown()
        server.server_close()


def real_waits() -> float:
    """One prompt that is always answered with 503: refused after 5 waits, the others answered meanwhile."""
    server = BadServer({"p12": "503"})
    begin = time.monotonic()
    try:
        found = rounds(server, timeout_s=30)
        assert set(found.refused) == {4} and found.lost == 0 and len(found.answers) == REQUESTS - 1 and found.retried == 5
        times = time.monotonic() - begin
        assert 15 < times < 50, times
        return times
    finally:
        server.shutdown()
        server.server_close()


def all_at_once() -> None:
    """Every kind in one run of 200 requests, in an order of its own."""
    server = BadServer({5 * i + 3: kind for i, kind in enumerate(FAULTS)})
    try:
        with patch.object(slots, "BACKOFF_S", 0.05):
            found = rounds(server, timeout_s=2.0, count=200, give_up=50)
        assert len(found.answers) + len(found.refused) == 200 and len(found.refused) >= len(REFUSED) - 4
        assert server.most_in_flight <= PLACES + 20
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
