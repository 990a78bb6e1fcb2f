"""What a rollout engine is: prompts in, sampled tokens with their log-probabilities out, weights replaced while it lives.

    engine.begin_update(7)                    # monotone; from here on nothing is generated
    engine.push(update_info)                  # once per bucket; the transport (rollout/transports/) carried or will carry the bytes
    engine.finish_update()                    # weight_version is 7, the prefix cache is empty
    engine.generate(prompt_ids, SamplingParams(n=8, max_tokens=256), timeout_s=120)

Prompts and completions are token ids: nothing is tokenised twice, so the trainer scores exactly the tokens that were sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

__all__ = [
    "Completion", "EngineBusyError", "EngineError", "EngineLostError", "EngineTimeoutError", "Health", "RolloutEngine", "SamplingParams", "WrongModelError"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions of one prompt are drawn."""

    max_tokens: int
    n: int = 1
    """Completions of the prompt: a GRPO group."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens.  Below 1 and above 0 these two cut the support, and log-probabilities are renormalised over what is left."""
    seed: int | None = None
    """The same seed, prompt, weights and n give the same tokens; the n completions differ from each other."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends beside the tokenizer's own."""
    vocab_size: int | None = None
    """Ids of the tokenizer, where the model has padding behind them: an answer with such an id is refused.  None: all of the model's are taken."""


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: tuple[int, ...]
    """With the token that ended it, when finish_reason is "stop"."""
    logprobs: tuple[float, ...]
    """Nats, one per token, of the distribution it was drawn from: after temperature, top-p and top-k."""
    finish_reason: str
    """stop: an end token; length: max_tokens or the context's end."""
    weight_version: int
    """Of the weights that drew every one of its tokens."""


class Health(Enum):
    """What an engine can do now.  Only a finished update makes a STALE engine HEALTHY."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """Did not answer, and nothing proves that it is dead: is asked for nothing until it answers a probe, and is DEAD when it misses several."""
    STALE = "stale"
    """Alive, without a complete set of the newest weights: generates nothing."""
    DEAD = "dead"
    """Its process has ended, or it says so itself."""


class EngineError(RuntimeError):
    """An engine answered, and the answer is a refusal: asking again or elsewhere would not help."""

    exit_code = 5


class EngineBusyError(EngineError):
    """An engine that is well did not give an answer this time (HTTP 5xx or 429, a body that is none): asked again, it may."""


class WrongModelError(EngineError):
    """The engine serves another model, vocabulary or tensor shapes than the trainer trains, or is ahead of it in weight versions."""


class EngineLostError(EngineError):
    """An engine died, hangs or cannot be reached: what was asked of it may be asked of another one."""


class EngineTimeoutError(EngineLostError):
    """An engine did not answer in time."""


class RolloutEngine(Protocol):
    """Implemented by rollout/vllm_http.py (a child process or a remote server) and, in tests of failures only, by a fake.

    Methods block; generate may be called from several threads at once.  EngineLostError after a lost connection or a missed deadline."""

    name: str
    """For messages: its URL."""
    weight_version: int | None
    """None: no complete set of weights from us yet."""

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, *, timeout_s: float) -> list[Completion]:
        """params.n completions.  EngineError while STALE, for a prompt that leaves no room, for samples of mixed or other weights, and for an
        answer that is not what was asked for; EngineBusyError when asking again may help."""

    def begin_update(self, version: int) -> None:
        """Stop generating and expect weights.  WrongModelError unless `version` is above weight_version."""

    def push(self, update_info: Mapping[str, Any]) -> None:
        """Let the engine load one bucket that the transport describes (names, dtypes, shapes, place, checksums)."""

    def finish_update(self) -> None:
        """The pushed weights are complete: weight_version becomes that of begin_update, the prefix cache is emptied, generation goes on."""

    def pause(self) -> None:
        """Hold running and new requests; what was sampled is kept."""

    def resume(self) -> None: ...

    def sleep(self, level: int = 1) -> None:
        """Free device memory: level 1 keeps a host copy of the weights, level 2 drops them (an update must follow)."""

    def wake(self) -> None: ...

    def health(self) -> Health: ...

    def restart(self) -> None:
        """Bring a DEAD engine back, STALE: a child process is started again, a remote server is waited for.  EngineLostError when it stays away."""

    def close(self) -> None:
        """Release it; a child process is ended, a remote server is left running."""
