"""Log-probabilities of given tokens from a vLLM server: its prompt_logprobs.  Any OpenAI-compatible vLLM server will do, with nothing of ours.

    engine = PromptScores("http://127.0.0.1:8000")          # vllm serve HF_DIR
    logp = engine.logp(token_ids)                            # nats, one per token, the first 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_plugin.rollout.engine import EngineError, EngineLostError
from megatron_plugin.rollout.vllm_wire import CONTROL_S, Wire

__all__ = ["PromptScores"]


class PromptScores:
    """A server as it is: no weights are sent.  From several threads at once."""

    def __init__(self, url: str, *, timeout_s: float = 600.0):
        """EngineLostError when nothing answers, EngineError when what answers is no vLLM server with a model."""
        self._wire, self._timeout_s = Wire(url.rstrip("/")), timeout_s
        models = self._wire.request("GET", "/v1/models", CONTROL_S).json().get("data") or []
        if not models or not isinstance(models[0].get("max_model_len"), int):
            raise EngineError(f"{url}: got no model with a max_model_len from /v1/models, expected a vLLM server (vllm serve HF_DIR)")
        self.model: str = models[0]["id"]
        self.longest: int = models[0]["max_model_len"] - 1
        """Tokens that can be scored: the server insists on drawing one more."""
        self.weights = self._whose_weights()
        """Such as "version 7", of a trainer that sends them; "": the server says nothing about it, as `vllm serve` does not."""

    def _whose_weights(self) -> str:
        """EngineError for a server of ours that has none yet: scores of random weights look like scores."""
        try:
            version = self._wire.read("GET", "/weight_info", "weight_version")
            if str(version).isdigit():
                return f"version {version}"
            self._wire.call("megatron_plugin_describe")
        except EngineLostError:
            raise
        except EngineError:  # no such route: a server of somebody else's, with the weights that it was started with
            return ""
        raise EngineError(f"{self._wire.url}: got a rollout server that no trainer has sent weights to, so they are random; expected the model's own: "
                          "start `vllm serve HF_DIR`, or score with the run directory")  # fmt: skip

    def logp(self, token_ids: Sequence[int]) -> list[float]:
        """log p of each token given those before it, nats at temperature 1 whatever the server samples with; 0 for the first, which nothing predicts.

        EngineError for more than `longest` tokens, and for an answer that does not have one finite number per token."""
        ids = list(token_ids)
        if not 0 < len(ids) <= self.longest:
            raise EngineError(f"{self._wire.url}: got {len(ids)} tokens, expected 1 to {self.longest}: serve a longer context, or cut them")
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self._wire.request("POST", "/v1/completions", self._timeout_s, json=body).json()
        entries = answer["choices"][0].get("prompt_logprobs") or []
        try:
            found = [0.0, *(float(entry[str(token)]["logprob"]) for entry, token in zip(entries[1:], ids[1:], strict=True))]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self._wire.url}: got prompt_logprobs without an entry for each of {len(ids)} tokens ({error!r}): another tokenizer?") from error
        if not all(map(math.isfinite, found)):
            raise EngineError(f"{self._wire.url}: got a log-probability that is no finite number, expected {len(ids)} finite ones")
        return found
