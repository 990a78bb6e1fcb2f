"""What the engine makes of a server's answers, with a server that answers as it is told.  No vLLM is needed; what a real one answers is in test_vllm_engine.py."""

import time

import pytest

from megatron_plugin.rollout.engine import (
    Completion,
    EngineBusyError,
    EngineError,
    EngineLostError,
    EngineTimeoutError,
    Health,
    SamplingParams,
    WrongModelError,
)
from megatron_plugin.rollout.lease import LEASE_S, Lease
from megatron_plugin.rollout.vllm_http import connect_engine
from megatron_plugin.rollout.vllm_model import ModelDescription
from tests.rollout.bad_server import BadServer
from tests.rollout.http_server import SERVED, Scripted, choice


@pytest.fixture
def server():
    server = Scripted()
    yield server
    server.shutdown()
    server.server_close()


def update(engine, version):
    engine.begin_update(version)
    engine.finish_update()


@pytest.fixture
def engine(server):
    """With weights of version 7."""
    engine = connect_engine(server.url, ModelDescription(vocab_size=320))
    update(engine, 7)
    server.asked.clear()
    yield engine
    engine.close()


def ask(engine, **params):
    return engine.generate([1, 2, 3], SamplingParams(**dict(max_tokens=8) | params), timeout_s=5.0)


def test_an_answer(engine, server):
    server.choices = [choice(1, (9,), (-0.5,), reason="stop"), choice(0)]
    assert ask(engine, n=2) == [Completion((5, 6), (-1.0, -2.0), "length", 7), Completion((9,), (-0.5,), "stop", 7)]
    ((path, body),) = server.asked
    assert path == "/inference/v1/generate" and body["token_ids"] == [1, 2, 3]
    assert body["sampling_params"] == dict(
        n=2, max_tokens=8, temperature=1.0, top_p=1.0, top_k=0, seed=None, stop_token_ids=[257], logprobs=0, detokenize=False
    )


def test_completions_never_leave_the_context(engine, server):
    engine.generate([1] * 509, SamplingParams(max_tokens=8), timeout_s=5.0)
    assert server.asked[-1][1]["sampling_params"]["max_tokens"] == 3


def test_empty_completions_are_completions(engine, server):
    """Without tokens there is nothing whose version could be wrong; they are counted further up (judge.py)."""
    server.choices = [choice(0, (), (), (), "stop"), choice(1) | dict(token_ids=None, logprobs=None, weight_versions=None, finish_reason="stop")]
    assert ask(engine, n=2) == [Completion((), (), "stop", 7)] * 2


BAD = {
    "old weights": (choice(versions=("6",)), r"version\(s\) 6, expected 7 alone: was the server restarted"),
    "mixed weights": (choice(versions=("7", "8")), r"version\(s\) 7, 8, expected 7 alone"),
    "unknown weights": (choice(versions=()), r"version\(s\) unknown, expected 7 alone"),
    "a token without": (choice(logprobs=(-1.0,)), "got 1 log-probabilities for 2 tokens"),
    "none at all": (choice() | dict(logprobs=None), "got 0 log-probabilities for 2 tokens"),
    "not finite": (choice(logprobs=(-1.0, float("-inf"))), "expected one finite number for each"),
    "above 0": (choice(logprobs=(-1.0, 0.25)), "2 log-probabilities for 2 tokens, 0.25 among them, expected one finite number for each, none above 0"),
    "null": (choice(logprobs=(-1.0, None)), "None among them"),
    "a stray token": (choice(tokens=(5, 320)), r"got token 320 in a completion, expected ids in \[0, 320\)"),
    "no token id": (choice(tokens=(5, True)), "got token True in a completion"),
    "too long": (choice(tokens=(5,) * 9, logprobs=(-1.0,) * 9), "got a completion of 9 tokens, expected at most 8"),
    "numbered from 1": (choice(1), "got completions numbered 1, expected 1 of them, from 0 on"),
    "aborted": (choice(reason="abort"), "ended by 'abort', expected 'stop' or 'length'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_answers_that_are_none(engine, server, case):
    server.choices, message = [BAD[case][0]], BAD[case][1]
    with pytest.raises(EngineError, match=message) as error:
        ask(engine)
    assert not isinstance(error.value, (EngineLostError, EngineBusyError)), "asking again would not help"
    assert engine.health() is (Health.STALE if "weights" in case else Health.HEALTHY), "of other weights no answer is of use"


def test_padding_of_the_vocabulary_is_refused_where_the_request_says_its_size(engine, server):
    """Models have more columns than their tokenizer has ids: one is drawn in a million, and no trainer has a label for it."""
    server.choices = [choice(tokens=(5, 300))]
    assert ask(engine, vocab_size=301)[0].token_ids == ask(engine)[0].token_ids == (5, 300)
    with pytest.raises(EngineError, match=r"got token 300 in a completion, expected ids in \[0, 300\): padding of the vocabulary") as error:
        ask(engine, vocab_size=300)
    assert not isinstance(error.value, (EngineLostError, EngineBusyError)) and engine.health() is Health.HEALTHY


def test_an_answer_from_before_an_update_does_not_spoil_the_update(engine, server):
    """A request that waited behind the update: its answer is of the new weights, which is not what was asked for, and the engine is well."""
    server.choices, answer = [choice(versions=("8",))], server.answer

    def late(path, body):
        if path == "/inference/v1/generate":
            update(engine, 8)
        return answer(path, body)

    server.answer = late
    with pytest.raises(EngineError, match="expected 7 alone"):
        ask(engine)
    assert engine.health() is Health.HEALTHY and engine.weight_version == 8


def test_a_refusal_is_not_a_loss(engine, server):
    """After HTTP 500 the server closes the connection: what is asked next must not go there."""
    for status, body in [(500, {"detail": "no such thing"}), (400, {"error": {"message": "no such thing"}})]:
        server.answers["/inference/v1/generate"] = status, body
        for _ in range(20):
            with pytest.raises(EngineError, match=f"HTTP {status}: no such thing") as error:
                ask(engine)
            assert type(error.value) is (EngineBusyError if status == 500 else EngineError)
            assert engine.health() is Health.HEALTHY


def test_a_dead_engine_behind_a_living_server_is_lost(engine, server):
    server.answers |= {"/inference/v1/generate": (500, {"detail": "EngineCore died"}), "/health": (503, {})}
    with pytest.raises(EngineLostError, match="HTTP 500: EngineCore died"):
        ask(engine)
    assert engine.health() is Health.DEAD


def test_weights_that_do_not_fit_are_another_models(engine, server):
    server.answers["/update_weights"] = 500, {"detail": "Call failed: weights do not fit the served model: a: got a shape of (1,)"}
    engine.begin_update(8)
    with pytest.raises(WrongModelError, match="do not fit the served model: a"):
        engine.push({})
    assert engine.health() is Health.STALE


@pytest.mark.parametrize(
    "path, answer, message",
    [("/finish_weight_update", (500, {"detail": "no"}), "no"), ("/reset_prefix_cache", (200, {"success": False}), "prefix cache could not be emptied"),
     ("/weight_info", (200, {"weight_version": "9"}), "got weight version 9 after the update, expected 8"), ("/resume", (500, {"detail": "no"}), "no")],
)  # fmt: skip
def test_nothing_is_generated_after_half_an_update(engine, server, path, answer, message):
    """Whatever fails between begin and the end of finish: STALE, nothing asked of the server, and the next update makes it good."""
    engine.begin_update(8)
    server.answers[path] = answer
    with pytest.raises(EngineError, match=message):
        engine.finish_update()
    server.asked.clear()
    assert engine.health() is Health.STALE
    with pytest.raises(EngineError, match="STALE.*send_weights first"):
        ask(engine)
    assert not any("generate" in path for path, _ in server.asked)
    engine.abort_update()
    server.answers.clear()
    update(engine, 10)
    server.choices = [choice(versions=("10",))]
    assert ask(engine)[0].weight_version == 10


def test_an_update_in_order(engine, server):
    engine.begin_update(8)
    engine.push({"names": []})
    engine.finish_update()
    assert [path for path, _ in server.asked] == [
        "/weight_info", "/pause", "/collective_rpc", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/weight_info",
        "/resume",
    ]  # fmt: skip
    for call in (lambda: engine.push({}), engine.finish_update):
        with pytest.raises(EngineError, match="no update was begun: call begin_update first"):
            call()


def test_versions_never_go_back(engine, server):
    for bad in (7, 6, -1):
        with pytest.raises(WrongModelError, match=f"got weight version {bad}, expected one above 7"):
            engine.begin_update(bad)
    server.version = "12"
    with pytest.raises(WrongModelError, match="got weight version 8, expected one above 12"):
        engine.begin_update(8)
    assert not {"/pause", "/start_weight_update"} & {path for path, _ in server.asked}, "nothing was stopped"


def test_a_server_that_is_none_of_ours(server):
    server.answers["/collective_rpc"] = 404, {"detail": "Not Found"}
    with pytest.raises(EngineError, match="HTTP 404: Not Found: it does not say what it serves: was it started by 'megatron-plugin serve'"):
        connect_engine(server.url, ModelDescription())
    server.answers["/collective_rpc"] = 200, {"results": [SERVED | {"vllm": "0.11.0"}]}
    with pytest.raises(RuntimeError, match="got vLLM 0.11.0, expected 0.27.1 to 0.32"):
        connect_engine(server.url, ModelDescription())


def test_a_web_page_is_shown_by_its_title(server):
    server.answers["/health"] = 404, "x"
    reasons = {"<!DOCTYPE html><html><title> Not here </title>" + "<p>" * 900: r"HTTP 404: a web page \(Not here\): is something else than vLLM listening there\?$",
               "<html><body>no</body></html>": "a web page: is something", "plain words": "HTTP 404: plain words$"}  # fmt: skip
    for page, shown in reasons.items():
        server.handle_bad = lambda handler, path, body, page=page: _page(handler, page)
        with pytest.raises(EngineError, match=shown):
            connect_engine(server.url, ModelDescription())


def _page(handler, text):
    handler.send_response(404)
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text.encode())
    return True


class Leased:
    """The server's side of a lease, over HTTP, as vllm_plugin.py has it."""

    def __init__(self, server):
        self.lease, self.now, answer = Lease(), 0.0, server.answer

        def with_lease(path, body):
            calls = {"megatron_plugin_claim": lambda owner: self.lease.claim(owner, self.now), "megatron_plugin_release": self.lease.release}
            if body.get("method") in calls:
                return 200, {"results": [calls[body["method"]](*body["args"])]}
            return answer(path, body)

        server.answer = with_lease


def test_a_second_trainer_is_refused_while_the_first_is_heard(server):
    leased, expected = Leased(server), ModelDescription(vocab_size=320)
    first = connect_engine(server.url, expected, owner="a:/runs/first")
    leased.now = LEASE_S - 1
    with pytest.raises(EngineError, match=r"a server that a:/runs/first sends weights to, last 599 s ago, expected one of this run's own") as refused:
        connect_engine(server.url, expected, owner="a:/runs/second")
    assert not isinstance(refused.value, EngineLostError)
    update(first, 1)  # heard again
    leased.now += LEASE_S - 1
    with pytest.raises(EngineError, match="a:/runs/first"):
        connect_engine(server.url, expected, owner="a:/runs/second")
    connect_engine(server.url, expected, owner="a:/runs/first").close()  # resumed: it is let in, and gives the server back
    second = connect_engine(server.url, expected, owner="a:/runs/second")
    with pytest.raises(EngineError, match="a:/runs/second"):
        first.begin_update(5)
    assert not any(path == "/pause" for path, _ in server.asked[-2:]), "the second one's server was stopped"
    update(second, 2)


def test_a_trainer_that_was_killed_loses_its_server_after_a_while(server):
    leased, expected = Leased(server), ModelDescription(vocab_size=320)
    connect_engine(server.url, expected, owner="killed")
    leased.now = LEASE_S + 1
    update(connect_engine(server.url, expected, owner="next"), 1)


def test_who_gives_no_name_neither_takes_nor_asks(server):
    Leased(server)
    connect_engine(server.url, ModelDescription(), owner="a")
    update(connect_engine(server.url, ModelDescription()), 1)
    assert not any(body.get("method") == "megatron_plugin_claim" and body["args"] == [""] for _, body in server.asked)


def test_pausing_keeps_the_cache(engine, server):
    server.answer, queries = server.answer, []
    server.handle_bad = lambda handler, path, body: queries.append(handler.path)
    engine.pause()
    assert queries == ["/pause?mode=keep&clear_cache=false"]


def test_an_answer_without_end_is_cut_off(monkeypatch):
    """httpx counts its timeout anew with every piece, and keeps all of them."""
    server = BadServer({0: "dribbles", 1: "endless"})
    engine = connect_engine(server.url, ModelDescription(vocab_size=320))
    update(engine, 1)
    try:
        begin = time.monotonic()
        with pytest.raises(EngineTimeoutError, match="no whole answer within 0.5 s"):
            engine.generate([1, 7], SamplingParams(max_tokens=8), timeout_s=0.5)
        assert time.monotonic() - begin < 3
        with pytest.raises(EngineLostError, match="got more than 10[0-9]{5} bytes, expected an answer that ends before"):
            engine.generate([1, 7], SamplingParams(max_tokens=8), timeout_s=60)
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
