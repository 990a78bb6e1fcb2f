"""What a server's prompt_logprobs become, and what is refused.  The server here speaks vLLM's format (0.32); a real one is slow to start."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_plugin.rollout.engine import EngineError, EngineLostError
from megatron_plugin.rollout.prompt_scores import PromptScores
from tests.rollout.http_server import Scripted


@pytest.fixture
def server():
    """A server with what it answers (`.models`, `.prompt_logprobs(ids)`) and the last body it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer({"data": httpd.models})

        def do_POST(self):
            httpd.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer({"choices": [{"text": "x", "prompt_logprobs": httpd.prompt_logprobs(httpd.body["prompt"])}]})

        def _answer(self, value):
            text = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.models = [{"id": "/model", "max_model_len": 9}]
    # beside the token's own entry vLLM gives that of the likeliest one
    httpd.prompt_logprobs = lambda ids: [None, *({str(token): {"logprob": -token / 8, "rank": 2}, "0": {"logprob": -0.1, "rank": 1}} for token in ids[1:])]
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_the_tokens_own_log_probabilities_at_their_own_places(server):
    engine = PromptScores(server.url + "/")
    assert engine.longest == 8 and engine.logp([7, 3, 5]) == [0.0, -3 / 8, -5 / 8] and engine.logp([7]) == [0.0]
    engine.logp([7, 3])
    assert server.body == {"model": "/model", "prompt": [7, 3], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


@pytest.mark.parametrize("answer, message", [
    (lambda ids: [None], "without an entry for each of 3 tokens"),
    (lambda ids: None, "without an entry for each of 3 tokens"),
    (lambda ids: [None, {"3": {"logprob": -1.0}}, {"9": {"logprob": -1.0}}], "another tokenizer"),
    (lambda ids: [None, {"3": {"logprob": -1.0}}, {"5": {"logprob": float("-inf")}}], "no finite number"),
])  # fmt: skip
def test_answers_that_do_not_fit_are_refused(answer, message, server):
    server.prompt_logprobs = answer
    with pytest.raises(EngineError, match=message):
        PromptScores(server.url).logp([7, 3, 5])


def test_too_many_tokens_and_no_tokens(server):
    for ids in ([], list(range(9))):
        with pytest.raises(EngineError, match=f"got {len(ids)} tokens, expected 1 to 8"):
            PromptScores(server.url).logp(ids)


def test_what_is_no_vllm_server(server):
    server.models = []
    with pytest.raises(EngineError, match="got no model with a max_model_len"):
        PromptScores(server.url)
    with pytest.raises(EngineLostError):
        PromptScores("http://127.0.0.1:9")


def test_whose_weights_the_server_has():
    """`vllm serve` says nothing; ours has a trainer's, or random ones, which would be scored like any."""
    server = Scripted()
    server.answers["/v1/models"] = 200, {"data": [{"id": "m", "max_model_len": 9}]}
    with pytest.raises(EngineError, match="a rollout server that no trainer has sent weights to, so they are random; expected the model's own"):
        PromptScores(server.url)
    server.version = "12"
    assert PromptScores(server.url).weights == "version 12"
    server.version, server.answers["/collective_rpc"] = "default", (500, {"detail": "no such method"})
    assert PromptScores(server.url).weights == ""
    server.answers["/weight_info"] = 404, {"detail": "Not Found"}
    assert PromptScores(server.url).weights == ""
    server.shutdown()
    server.server_close()
