"""Hinted decoding with a Hugging Face model: one answer at a time, both streams in step, each with its key-value cache.

The slow way, for models without a vLLM, and what the fast one is tested against: it shares no mathematics with mixing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_plugin.rollout.hinted.options import HintedOptions

__all__ = ["LockstepAnswer", "decode_in_lockstep", "exact_mix", "mixed_distributions"]


@dataclass(frozen=True)
class LockstepAnswer:
    token_ids: list[int]
    end_reason: str
    """eos, repeating, length."""
    logp: list[float]
    """Nats, of each token under the distribution it was drawn from."""
    split_at: int | None


@torch.inference_mode()
def decode_in_lockstep(
    model, plain_ids: Sequence[int], hinted_ids: Sequence[int], options: HintedOptions, tokenizer=None, distribution: Callable[..., Tensor] | None = None
) -> LockstepAnswer:
    """One answer.  model: a Hugging Face causal LM.  tokenizer: needed for a splitter.  Drawn with a generator seeded by options.seed: other
    tokens than vLLM's for the same seed, unless the temperature is 0.  distribution: what a token is drawn from, None: exact_mix, which is slow."""
    distribution = distribution or exact_mix
    generator = torch.Generator(model.device).manual_seed(options.seed)
    streams = [_Stream(model, hinted_ids), _Stream(model, plain_ids)]
    tokens: list[int] = []
    logp: list[float] = []
    split_at: int | None = None
    while len(tokens) < options.max_tokens:
        p_V, q_V = (stream.next_logits() for stream in streams)
        m_V = distribution(p_V, q_V, options, first=not tokens, plain_only=split_at is not None)
        token = int(m_V.argmax()) if options.temperature == 0 else int(torch.multinomial(m_V, 1, generator=generator))
        tokens.append(token)
        logp.append(math.log(m_V[token].item()))
        for stream in streams:
            stream.append(token)
        if token in options.end_ids:
            return LockstepAnswer(tokens, "eos", logp, split_at)
        if options.splitter and split_at is None and options.splitter in tokenizer.decode(tokens, clean_up_tokenization_spaces=False):
            split_at = len(tokens)
        if (
            options.repeat_every
            and len(tokens) % options.repeat_every == 0
            and len(tokens) < options.max_tokens
            and _repeating(tokens, options)
        ):
            return LockstepAnswer(tokens, "repeating", logp, split_at)
    return LockstepAnswer(tokens, "length", logp, split_at)


@torch.inference_mode()
def mixed_distributions(
    model, plain_ids: Sequence[int], hinted_ids: Sequence[int], tokens: Sequence[int], options: HintedOptions, tokenizer=None
) -> Tensor:
    """What each of `tokens` was to be drawn from: [T, V] fp64 probabilities, over the whole of options.vocab_size, after nucleus and temperature.

    One forward of each stream over prompt and answer."""
    rows = []
    for prompt in (hinted_ids, plain_ids):
        ids = torch.tensor([[*prompt, *tokens]], device=model.device)
        rows.append(model(ids).logits[0, len(prompt) - 1 : -1])
    found, distributions = False, []
    for step in range(len(tokens)):
        distributions.append(exact_mix(rows[0][step], rows[1][step], options, first=step == 0, plain_only=found))
        found = found or bool(
            options.splitter and options.splitter in tokenizer.decode(tokens[: step + 1], clean_up_tokenization_spaces=False)
        )
    return torch.stack(distributions)


class _Stream:
    """A prompt and what was appended to it; each token goes through the model once."""

    def __init__(self, model, prompt: Sequence[int]):
        self.model, self.cache = model, None
        self.unseen = list(prompt)

    def next_logits(self) -> Tensor:
        ids = torch.tensor([self.unseen], device=self.model.device)  # the cache holds the others: never the whole answer again
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.cache, self.unseen = output.past_key_values, []
        return output.logits[0, -1]

    def append(self, token: int) -> None:
        self.unseen.append(token)


def exact_mix(hinted_V: Tensor, plain_V: Tensor, options: HintedOptions, *, first: bool, plain_only: bool) -> Tensor:
    """[vocab_size] fp64 probabilities: the oracle, each formula as it is written and nothing shared with mixing.py."""
    size = options.vocab_size
    p_V, q_V = (torch.softmax(logits_V[:size].double(), -1) for logits_V in (hinted_V, plain_V))
    share = 0.0 if first and options.first_from_hint else _share(p_V, options)
    share = 1.0 if plain_only else share
    m_V = p_V ** (1.0 - share) * q_V**share
    m_V = m_V / m_V.sum()
    if options.top_p < 1:
        order = sorted(range(size), key=lambda v: -m_V[v].item()) if size <= 1024 else m_V.argsort(descending=True, stable=True).tolist()
        sums = torch.cumsum(m_V[order], 0)
        count = int((sums < options.top_p).sum()) + 1  # the one that reaches top_p is in
        kept_V = torch.zeros_like(m_V)
        kept_V[order[:count]] = m_V[order[:count]]
        m_V = kept_V / kept_V.sum()
    if options.temperature not in (0, 1):
        m_V = (m_V / m_V.max()) ** (1.0 / options.temperature)
    return m_V / m_V.sum()


def _share(p_V: Tensor, options: HintedOptions) -> float:
    entropy = -torch.special.xlogy(p_V, p_V).sum().item() / math.log(options.vocab_size)
    if options.schedule == "linear":
        return min(max(options.beta * entropy, 0.0), 1.0)
    if options.schedule == "sigmoid":
        return 1.0 / (1.0 + math.exp(-options.beta * (entropy - options.center)))
    low, high = options.bounds
    return min(max((entropy - low) / (high - low), 0.0), 1.0)


def _repeating(tokens: list[int], options: HintedOptions) -> bool:
    n = options.repeat_ngram
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(runs) > 0 and max(runs.count(run) for run in set(runs)) >= options.repeat_count
