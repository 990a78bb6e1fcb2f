"""An HTTP server that answers like vLLM's, or as a test tells it.  Tests of failures, and of what is on the wire."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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

    def handle_error(self, request, client_address):
        """A client that went away is what these tests are about."""

    def handle_bad(self, handler, path, body):
        """bad_server.py answers here in ways that are no answer."""
        return False

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
        path = self.path.partition("?")[0]
        if self.server.handle_bad(self, path, body):
            return
        status, answer = self.server.answer(path, body)
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
