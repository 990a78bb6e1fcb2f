"""Conversations -> prompts for rollouts: what the model is asked, as token ids, and the answer it is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_plugin.data.errors import BadLines, DataError
from megatron_plugin.data.messages import Conversation
from megatron_plugin.data.tokenize import ConversationEncoder

__all__ = ["Prompt", "PromptSet", "encode_prompts"]


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    """Everything before the answer, through the chat template, with the generation prompt."""
    text: str
    """The turn before the answer."""
    reference: str
    """The answer: the last turn that is trained."""
    source: str
    """file:line"""


@dataclass(frozen=True)
class PromptSet:
    prompts: tuple[Prompt, ...]
    too_long: tuple[str, ...]
    """file:line of prompts that leave no room for a completion."""
    unasked: tuple[str, ...] = ()
    """file:line of conversations that begin with the answer: there is nothing to ask."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __str__(self) -> str:
        longest = max(len(p.token_ids) for p in self.prompts)
        unasked = f", {len(self.unasked)} as beginning with the answer" if self.unasked else ""
        return f"{len(self.prompts)} prompts of up to {longest} tokens; {len(self.too_long)} left out as too long{unasked}"

    def fingerprint(self) -> int:
        """Of the tokens and references, in order: a position in one set means nothing in another."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(repr((prompt.token_ids, prompt.reference)).encode())
        return int.from_bytes(digest.digest()[:7], "big")


def encode_prompts(conversations: Sequence[Conversation], tokenizer, *, longest: int, bad_lines: BadLines | None = None) -> PromptSet:
    """The prompts of conversations that end with an answer, without those of more than `longest` tokens; what is left out is named.
    Those that tokenizer or template refuse go to `bad_lines`, whose policy decides.

    DataError when none is left."""
    bad_lines = BadLines() if bad_lines is None else bad_lines
    encoder, kept, too_long, unasked = ConversationEncoder(tokenizer), [], [], []
    for conversation in conversations:
        answer = max(i for i, message in enumerate(conversation.messages) if message.train)
        if answer == 0:
            unasked.append(conversation.source)
            continue
        try:
            ids = tuple(encoder.prompt(conversation))
        except DataError as error:
            bad_lines.add(error)
            continue
        if len(ids) > longest:
            too_long.append(conversation.source)
            continue
        asked, answered = conversation.messages[answer - 1 : answer + 1]
        kept.append(Prompt(ids, asked.content, answered.content, conversation.source))
    bad_lines.check()
    if not kept:
        raise DataError(f"got no prompt to sample from, expected some of at most {longest} tokens ({len(too_long)} are longer, {len(unasked)} "
                        "begin with the answer): raise data.seq_length or lower rollout.max_tokens")  # fmt: skip
    return PromptSet(tuple(kept), tuple(too_long), tuple(unasked))
