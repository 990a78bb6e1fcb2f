"""Requests to one vLLM server over HTTP, and what becomes of them: an answer, a refusal, or a lost engine."""

from __future__ import annotations

from typing import Any

import httpx

from megatron_plugin.rollout.engine import EngineError, EngineLostError, WrongModelError

__all__ = ["CONNECT_S", "CONTROL_S", "Wire"]

CONTROL_S = 120.0  # for routes that do not generate; the longest is a bucket of weights, and a pause behind long generations
CONNECT_S = 10.0
UNFIT = "do not fit the served model"  # in every message of vllm_plugin.py and expected_weights.py about weights of another model


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
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))
        try:
            response = self._client.request(verb, path, timeout=timeout, **arguments)
        except httpx.TimeoutException as error:
            raise EngineLostError(f"{self.url}{path}: no answer within {timeout_s:g} s") from error
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: the client was closed by restart() in another thread
            raise EngineLostError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        if response.status_code == 200:
            return response
        reason = f"{self.url}{path}: HTTP {response.status_code}: {_reason(response)}"
        if UNFIT in reason:
            raise WrongModelError(reason)
        if response.status_code < 500 or (path != "/health" and self.healthy()):
            raise EngineError(reason)
        raise EngineLostError(reason)

    def call(self, method: str) -> list[Any]:
        """A method of vllm_plugin.WorkerExtension on every worker."""
        return self.request("POST", "/collective_rpc", json={"method": method}).json()["results"]

    def healthy(self) -> bool:
        """Does the server say that it is well?"""
        try:
            self.request("GET", "/health", CONNECT_S)
        except EngineError:
            return False
        return True

    def close(self) -> None:
        """Requests under way and new ones: EngineLostError."""
        self._client.close()


def _reason(response: httpx.Response) -> str:
    """What vLLM says about a failure, without its JSON around it."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:500]
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)
