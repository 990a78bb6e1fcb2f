"""Requests to one vLLM server over HTTP, and what becomes of them: an answer, a refusal, or a lost engine.

| what happens | control routes (`request`) | generation (`ask`), which may be asked again |
|---|---|---|
| nothing comes, or not in time, or it is cut off | EngineLostError, EngineTimeoutError | the same |
| HTTP 408, 425, 429, 502, 503, 504 | EngineLostError: what the server did is not known | EngineBusyError |
| HTTP 500 of a server that is well | EngineError | EngineBusyError |
| HTTP 5xx of a server that is not | EngineLostError | EngineLostError |
| HTTP 4xx else, 3xx | EngineError | EngineError |
| HTTP 200 with a body that is no JSON | EngineError | EngineBusyError |
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx

from megatron_plugin.rollout.engine import EngineBusyError, EngineError, EngineLostError, EngineTimeoutError, Health, WrongModelError

__all__ = ["CONNECT_S", "CONTROL_S", "MOST_BYTES", "Wire"]

CONTROL_S = 120.0  # for routes that do not generate; the longest is a bucket of weights, and a pause behind long generations
CONNECT_S = 10.0
MOST_BYTES = 64 << 20  # of an answer that is no completion; a server that never ends its answer must not fill the trainer's memory
UNFIT = "do not fit the served model"  # in every message of vllm_plugin.py and expected_weights.py about weights of another model
PASSING = (408, 425, 429, 502, 503, 504)  # of a server or a gateway before it that cannot now


class Wire:
    """`url`: exactly that one; no redirect is followed, no proxy of the environment is used.  From several threads at once."""

    def __init__(self, url: str):
        self.url = url
        # a connection for each request: the server closes one on which it answered HTTP 500, and a request that is sent on it meanwhile would be lost
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.Client(base_url=url, trust_env=False, follow_redirects=False, limits=limits)

    def request(self, verb: str, path: str, timeout_s: float = CONTROL_S, **arguments: Any) -> httpx.Response:
        """EngineLostError when no answer comes or the engine behind the server is dead, EngineError when the answer is a refusal, WrongModelError
        when it is that the weights are another model's."""
        response = self._send(verb, path, timeout_s, MOST_BYTES, arguments)
        if response.status_code == 200:
            return response
        reason = f"{self.url}{path}: HTTP {response.status_code}: {_reason(response)}"
        if UNFIT in reason:
            raise WrongModelError(reason)
        if response.status_code in PASSING:
            raise EngineLostError(reason)
        if response.status_code < 500 or (path != "/health" and self.healthy()):
            raise EngineError(reason)
        raise EngineLostError(reason)

    def ask(self, path: str, body: Any, timeout_s: float, *, most_bytes: int = MOST_BYTES) -> Any:
        """The JSON that a POST is answered with.  EngineBusyError for what may be otherwise the next time; else as `request`."""
        response = self._send("POST", path, timeout_s, most_bytes, {"json": body})
        if response.status_code == 200:
            try:
                return response.json()
            except ValueError as error:
                raise EngineBusyError(f"{self.url}{path}: got no JSON, expected it: {_reason(response)}") from error
        reason = f"{self.url}{path}: HTTP {response.status_code}: {_reason(response)}"
        if response.status_code < 500 and response.status_code not in PASSING:
            raise EngineError(reason)
        raise EngineBusyError(reason) if self.healthy() else EngineLostError(reason)

    def call(self, method: str, *arguments: str) -> list[Any]:
        """A method of vllm_plugin.WorkerExtension on every worker."""
        body = {"method": method} | ({"args": list(arguments)} if arguments else {})
        results = self.read("POST", "/collective_rpc", "results", json=body)
        if not isinstance(results, list) or not results:
            raise EngineError(f"{self.url}/collective_rpc: got {str(results)[:200]}, expected what each worker says")
        return results

    def read(self, verb: str, path: str, key: str, **arguments: Any) -> Any:
        """What the JSON of a control route's answer has under `key`; errors as `request`, and EngineError for another answer."""
        response = self.request(verb, path, **arguments)
        try:
            return response.json()[key]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{self.url}{path}: got no JSON with {key!r}, expected vLLM's answer: {_reason(response)}") from error

    def health(self) -> Health:
        """HEALTHY: the server says so.  DEAD: it says that it is not.  SUSPECT: it says nothing, or something in front of it speaks."""
        try:
            response = self._send("GET", "/health", CONNECT_S, MOST_BYTES, {})
        except EngineLostError:
            return Health.SUSPECT
        if response.status_code == 200:
            return Health.HEALTHY
        return Health.SUSPECT if response.status_code in (408, 425, 429, 502, 504) else Health.DEAD  # 503: vLLM's word for a dead engine

    def healthy(self) -> bool:
        """Does the server say that it is well?"""
        return self.health() is Health.HEALTHY

    def close(self) -> None:
        """Requests under way and new ones: EngineLostError."""
        self._client.close()

    def _send(self, verb: str, path: str, timeout_s: float, most_bytes: int, arguments: dict[str, Any]) -> httpx.Response:
        """What was answered, whatever its status.  At most `most_bytes`, within `timeout_s` all in all: httpx's own timeout begins anew with
        each piece that comes."""
        timeout, end = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)), time.monotonic() + timeout_s
        body = bytearray()
        try:
            with self._client.stream(verb, path, timeout=timeout, **arguments) as response:
                for piece in response.iter_bytes():
                    body += piece
                    if len(body) > most_bytes:
                        raise EngineLostError(f"{self.url}{path}: got more than {most_bytes} bytes, expected an answer that ends before")
                    if time.monotonic() > end:
                        raise EngineTimeoutError(f"{self.url}{path}: no whole answer within {timeout_s:g} s")
        except httpx.TimeoutException as error:
            raise EngineTimeoutError(f"{self.url}{path}: no answer within {timeout_s:g} s") from error
        except (httpx.HTTPError, httpx.StreamError, RuntimeError) as error:  # RuntimeError: the client was closed by restart() in another thread
            if isinstance(error, EngineError):
                raise
            raise EngineLostError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        return httpx.Response(response.status_code, content=bytes(body))


def _reason(response: httpx.Response) -> str:
    """What vLLM says about a failure, without its JSON around it; of a web page its title alone."""
    try:
        body = json.loads(response.content)
    except ValueError:
        return _of_text(response.text)
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:2000]


def _of_text(text: str) -> str:
    if re.search(r"<(!doctype|html|head|body)\b", text[:1000], re.IGNORECASE):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        return f"a web page{f' ({title[1].strip()[:200]})' if title else ''}: is something else than vLLM listening there?"
    return text[:500]
