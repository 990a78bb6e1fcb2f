"""A server that goes wrong at a request of the test's choice, in any of the ways of FAULTS; at all others it answers like vLLM."""

import json
import threading
import time

from tests.rollout.http_server import Scripted, choice

RETRIED = ("slow", "hangs", "dribbles", "cut", "closed", "endless", "500", "502", "503", "504", "429", "408", "no json", "half json", "other shape", "a list", "html")
"""Asked again until they are answered."""
REFUSED = ("400", "404 html", "nan", "minus infinity", "above 0", "null logprob", "no logprobs", "stray token", "negative token", "fewer", "more", "same index", "too long", "aborted")
"""The engine's last word about this prompt."""
LOST = ("other version", "mixed versions", "no version", "engine dead")
"""The engine is lost: nothing it says is of use until it has new weights."""
FAULTS = (*RETRIED, *REFUSED, *LOST)
STATUS = {"400": 400, "404 html": 404, "500": 500, "502": 502, "503": 503, "504": 504, "429": 429, "408": 408, "engine dead": 500}
PAGE = "<!DOCTYPE html><html><head><title>Welcome to nginx</title></head><body>" + "x" * 5000 + "</body></html>"


class BadServer(Scripted):
    """faults: {number of a generation, from 0, or the sum of a prompt as "p8": one of FAULTS}.  Answers are made of the prompt: see tokens_of."""

    def __init__(self, faults=None):
        super().__init__()
        self.faults, self.release = dict(faults or {}), threading.Event()
        self.prompts, self.in_flight, self.most_in_flight, self.dead = [], 0, 0, False
        self._lock = threading.Lock()

    def handle_bad(self, handler, path, body):
        """Whether the answer was given here."""
        if path == "/health" and self.dead:
            return _say(handler, 503, "")
        if path == "/finish_weight_update":
            self.dead = False  # as after a restart
        if path != "/inference/v1/generate":
            return False
        prompt = tuple(body["token_ids"])
        with self._lock:
            number = len(self.prompts)
            self.prompts.append(prompt)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            time.sleep(0.01)
            return self._generate(handler, prompt, body, self.faults.get(number) or self.faults.get(f"p{sum(prompt)}"))
        finally:
            with self._lock:
                self.in_flight -= 1

    def _generate(self, handler, prompt, body, fault):
        good = {"choices": [choice(i, tokens_of(prompt, i), (-0.5, -0.25), (self.version,)) for i in range(body["sampling_params"]["n"])]}
        text = json.dumps(good)
        self.dead = self.dead or fault == "engine dead"
        if fault in STATUS:
            return _say(handler, STATUS[fault], PAGE if "html" in fault else json.dumps({"error": {"message": f"scripted {fault}"}}))
        if fault in ("slow", "hangs"):
            self.release.wait(2 if fault == "slow" else 30)
        if fault in ("hangs", "closed"):
            handler.close_connection = True
            return True
        if fault in ("dribbles", "endless"):
            return self._stream(handler, fault)
        if fault == "cut":
            _head(handler, 200, len(text))
            handler.wfile.write(text[: len(text) // 2].encode())
            handler.close_connection = True
            return True
        bodies = {"no json": "I am fine", "half json": text[: len(text) // 2], "other shape": '{"text": "hello"}', "a list": "[1, 2]", "html": PAGE}
        return _say(handler, 200, bodies.get(fault) or json.dumps(spoiled(good, fault)))

    def _stream(self, handler, fault):
        """Bytes that never come to an end: one at a time, or as many as the other side takes."""
        _head(handler, 200, 1 << 40)
        end = time.monotonic() + 30
        try:
            while time.monotonic() < end and not self.release.is_set():
                handler.wfile.write(b" " if fault == "dribbles" else b" " * (1 << 20))
                if fault == "dribbles":
                    time.sleep(0.05)
        except OSError:
            pass
        handler.close_connection = True
        return True


def tokens_of(prompt, index):
    """What a good answer to a prompt is."""
    return (sum(prompt) % 300, index)


def spoiled(answer, fault):
    """The answer with what `fault` makes of its last choice."""
    choices = answer["choices"]
    last, logprobs = choices[-1], choices[-1]["logprobs"]["content"]
    values = {"nan": float("nan"), "minus infinity": float("-inf"), "above 0": 0.5, "null logprob": None}
    if fault in values:
        logprobs[0]["logprob"] = values[fault]
    elif fault == "no logprobs":
        last["logprobs"] = None
    elif fault in ("stray token", "negative token"):
        last["token_ids"][0] = 320 if fault == "stray token" else -1
    elif fault == "fewer":
        choices.pop()
    elif fault == "more":
        choices.append(choice(len(choices), (1, 2), (-0.5, -0.25), (last["weight_versions"][0]["version"],)))
    elif fault == "same index":
        last["index"] = 0
    elif fault == "too long":
        last["token_ids"], last["logprobs"] = [1] * 100, {"content": [{"logprob": -1.0}] * 100}
    elif fault == "aborted":
        last["finish_reason"] = "abort"
    elif fault == "no version":
        last["weight_versions"] = []
    elif fault in ("other version", "mixed versions"):
        version = last["weight_versions"][0]["version"]
        last["weight_versions"] = [{"version": "99999"}] + ([{"version": version}] if fault == "mixed versions" else [])
    return answer


def _head(handler, status, length):
    handler.send_response(status)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()


def _say(handler, status, text):
    _head(handler, status, len(text.encode()))
    handler.wfile.write(text.encode())
    return True
