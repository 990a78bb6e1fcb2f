"""What the engine makes of a server's answers, with a server that answers as it is told.  No vLLM is needed; what a real one answers is in test_vllm_engine.py."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_plugin.rollout.engine import Completion, EngineError, EngineLostError, Health, SamplingParams, WrongModelError
from megatron_plugin.rollout.vllm_http import connect_engine
from megatron_plugin.rollout.vllm_model import ModelDescription
from megatron_plugin.rollout.vllm_versions import TESTED

SERVED = dict(architecture="Qwen2ForCausalLM", vocab_size=320, hidden_size=128, layers=2, tied=False, dtype="float32", max_model_len=512, workers=1,
              end_token_ids=[257], backend="megatron_plugin_shm", vllm=TESTED, engine_id="")  # fmt: skip


def choice(index=0, tokens=(5, 6), logprobs=(-1.0, -2.0), versions=("7",), reason="length"):
    """Of an answer of vLLM's, as it is on the wire."""
    spans = [{"version": version, "start": 0, "end": len(tokens)} for version in versions]
    content = [{"logprob": logp} for logp in logprobs]
    return dict(index=index, token_ids=list(tokens), logprobs={"content": content}, weight_versions=spans, finish_reason=reason)


class Scripted(ThreadingHTTPServer):
    """answers: {path: (status, body)}, where they are not those of a healthy server with weights of version `version`.  asked: [(path, body)]."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers, self.asked, self.version, self.choices = {}, [], "default", [choice()]
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path, body):
        self.asked.append((path, body))
        if path in self.answers:
            return self.answers[path]
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        results = [SERVED] if body.get("method") == "megatron_plugin_describe" else [None]
        return 200, {"/collective_rpc": {"results": results}, "/weight_info": {"weight_version": self.version}, "/reset_prefix_cache": {"success": True},
                     "/inference/v1/generate": {"choices": self.choices}}.get(path, {})  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        status, answer = self.server.answer(self.path.partition("?")[0], body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        if status >= 500:  # as uvicorn after an error that nobody caught: closed without a word in the headers, once the traceback is written
            time.sleep(0.02)
            self.close_connection = True

    do_POST = do_GET

    def log_message(self, *_):
        pass


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
    """Without tokens there is nothing whose version could be wrong; they are counted further up (dispatch.py)."""
    server.choices = [choice(0, (), (), (), "stop"), choice(1) | dict(token_ids=None, logprobs=None, weight_versions=None, finish_reason="stop")]
    assert ask(engine, n=2) == [Completion((), (), "stop", 7)] * 2


BAD = {
    "old weights": (choice(versions=("6",)), r"version\(s\) 6, expected 7 alone: was the server restarted"),
    "mixed weights": (choice(versions=("7", "8")), r"version\(s\) 7, 8, expected 7 alone"),
    "unknown weights": (choice(versions=()), r"version\(s\) unknown, expected 7 alone"),
    "a token without": (choice(logprobs=(-1.0,)), "got 1 log-probabilities for 2 tokens"),
    "none at all": (choice() | dict(logprobs=None), "got 0 log-probabilities for 2 tokens"),
    "not finite": (choice(logprobs=(-1.0, float("-inf"))), "expected one finite number for each"),
    "aborted": (choice(reason="abort"), "ended by 'abort', expected 'stop' or 'length'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_answers_that_are_none(engine, server, case):
    server.choices, message = [BAD[case][0]], BAD[case][1]
    with pytest.raises(EngineError, match=message) as error:
        ask(engine)
    assert type(error.value) is EngineError
    assert engine.health() is (Health.STALE if "weights" in case else Health.HEALTHY), "of other weights no answer is of use"


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
            assert type(error.value) is EngineError
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
