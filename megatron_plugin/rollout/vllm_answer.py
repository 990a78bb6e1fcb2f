"""What a vLLM server's answer to a prompt must be before it is used: the completions asked for, every number one that can be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_plugin.rollout.engine import Completion, EngineBusyError, EngineError, SamplingParams

__all__ = ["OtherWeightsError", "choices_of", "completion_of", "most_bytes"]

ABOVE_0 = 1e-3  # nats that a log-probability may be above 0 by rounding; log_softmax in fp32 gives at most 1e-6


class OtherWeightsError(EngineError):
    """A completion of other weights than those that were asked."""


def most_bytes(params: SamplingParams) -> int:
    """That an answer may take: a token with its log-probability and token string is some 150 bytes of JSON."""
    return (1 << 20) + 1024 * params.n * params.max_tokens


def choices_of(answer: Any, count: int, engine: str) -> list[Mapping[str, Any]]:
    """The answer's choices by index.  EngineBusyError for JSON of another shape, EngineError for other than `count` of them."""
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    shaped = isinstance(choices, list) and all(isinstance(choice, Mapping) and type(choice.get("index")) is int for choice in choices)
    if not shaped:
        raise EngineBusyError(f"{engine}: got JSON without a list of choices, expected vLLM's answer: {str(answer)[:200]}")
    indices = sorted(choice["index"] for choice in choices)
    if indices != list(range(count)):
        raise EngineError(f"{engine}: got completions numbered {', '.join(map(str, indices[:20])) or 'nothing'}, expected {count} of them, from 0 on")
    return sorted(choices, key=lambda choice: choice["index"])


def completion_of(choice: Mapping[str, Any], params: SamplingParams, *, version: int, vocab_size: int, engine: str) -> Completion:
    """One choice.  EngineBusyError for JSON of another shape; OtherWeightsError; EngineError for tokens or log-probabilities that cannot be."""
    try:
        token_ids = tuple(choice["token_ids"] or ())
        logprobs = tuple(entry["logprob"] for entry in (choice["logprobs"] or {}).get("content") or ())
        versions = {span["version"] for span in choice.get("weight_versions") or ()}
        reason = choice["finish_reason"]
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineBusyError(f"{engine}: got a completion of another shape than vLLM's ({type(error).__name__}: {error})") from error
    if token_ids and versions != {str(version)}:
        raise OtherWeightsError(
            f"{engine}: got a completion of weight version(s) {', '.join(sorted(map(str, versions))) or 'unknown'}, expected {version} alone: "
            "was the server restarted, or is it updated by someone else, too?"
        )
    vocab_size = min(vocab_size, params.vocab_size or vocab_size)
    stray = next((token for token in token_ids if type(token) is not int or not 0 <= token < vocab_size), None)
    if stray is not None:
        raise EngineError(f"{engine}: got token {stray!r} in a completion, expected ids in [0, {vocab_size}): padding of the vocabulary, or another model?")
    if len(token_ids) > params.max_tokens:
        raise EngineError(f"{engine}: got a completion of {len(token_ids)} tokens, expected at most {params.max_tokens}")
    if len(logprobs) != len(token_ids) or not all(_is_logp(logp) for logp in logprobs):
        odd = [logp for logp in logprobs if not _is_logp(logp)][:1]
        raise EngineError(
            f"{engine}: got {len(logprobs)} log-probabilities for {len(token_ids)} tokens{f', {odd[0]!r} among them' if odd else ''}, expected one finite "
            "number for each, none above 0"
        )
    if reason not in ("stop", "length"):
        raise EngineError(f"{engine}: got a completion that ended by {reason!r}, expected 'stop' or 'length'")
    return Completion(token_ids, logprobs, reason, version)


def _is_logp(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value <= ABOVE_0
