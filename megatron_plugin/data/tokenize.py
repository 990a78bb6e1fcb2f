"""Conversations -> token ids with the trained positions marked.  Nothing is shifted here: labels[t] is tokens[t] (packing.py shifts, once).

Two ways to find the tokens of an assistant turn:
* the chat template marks them with {% generation %}: the tokenizer's assistant mask;
* otherwise by prefix difference: ids(turns up to here) minus ids(turns before, with the generation prompt).
Both end a trained turn with its end-of-turn token, which is trained, and leave what a template puts behind it (a newline) untrained.

Turns after the last trained one are not rendered: under a causal mask they cannot change the loss.   T: tokens of one sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_plugin.data.errors import BadLines, DataError
from megatron_plugin.data.messages import Conversation
from megatron_plugin.data.tokenizer import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE_INDEX", "ConversationEncoder", "Sample", "encode_all"]

IGNORE_INDEX = -100
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]  # first token of a turn, one past its last


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation as tokens; not shifted.  ValueError for columns that are not one value per token."""

    tokens_T: Tensor
    """int64."""
    labels_T: Tensor
    """int64: tokens_T where the turn is trained, -100 elsewhere."""
    weight_T: Tensor
    """fp32: the turn's weight where it is trained, 0 elsewhere."""
    source: str
    """file:line"""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 [T] each, by name: what else is known of a token (expert, advantage, old_logp, ...), at the token's own place like its label."""

    def __post_init__(self):
        for name, values in self.columns.items():
            if values.shape != self.tokens_T.shape:
                raise ValueError(
                    f"{self.source}: got column '{name}' of shape {list(values.shape)}, expected one value per token, {list(self.tokens_T.shape)}"
                )


class ConversationEncoder:
    """A tokenizer with what every conversation needs of it, looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self.bos = tokenizer.bos_token_id
        names = [name for name in tokenizer.convert_ids_to_tokens(sorted(self.special)) if name]
        # Longest first, so that the message names the token that the tokenizer would cut out.
        self._control = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"the tokenizer has no chat template (got {tokenizer.name_or_path}): save one with it, or pass data.chat_template ({error})"
            ) from error
        self.uses_mask = bool(GENERATION.search(template)) and tokenizer.is_fast

    def encode(self, conversation: Conversation) -> Sample:
        """The conversation up to its last trained turn; DataError "file:line: reason" where template and conversation do not fit."""
        last = max(i for i, message in enumerate(conversation.messages) if message.train)
        messages = conversation.messages[: last + 1]
        self._refuse_control_tokens(conversation)
        plain = [{"role": message.role, "content": message.content} for message in messages]
        ids, spans = (self._by_mask if self.uses_mask else self._by_prefix)(plain, conversation)
        weight_T = torch.zeros(len(ids), dtype=torch.float32)
        trained_T = torch.zeros(len(ids), dtype=torch.bool)
        for index, (start, stop) in spans.items():
            if messages[index].train:
                stop = self._end_of_turn(ids, start, stop, conversation.source)
                trained_T[start:stop] = True
                weight_T[start:stop] = messages[index].weight
        if not trained_T[1:].any():
            raise DataError(f"no token to predict (got {len(ids)} tokens, none trained behind the first)", conversation.source)
        tokens_T = torch.tensor(ids, dtype=torch.int64)
        return Sample(tokens_T, torch.where(trained_T, tokens_T, IGNORE_INDEX), weight_T, conversation.source)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids of everything before the last trained turn, with the generation prompt: what a model is asked when it is evaluated."""
        last = max(i for i, message in enumerate(conversation.messages) if message.train)
        plain = [{"role": message.role, "content": message.content} for message in conversation.messages[:last]]
        if not plain:
            raise DataError("got a conversation that begins with the assistant, expected a prompt before it", conversation.source)
        self._refuse_control_tokens(conversation)
        return self._render(plain, conversation.source, add_generation_prompt=True)["input_ids"]

    def _by_mask(self, plain: list[dict], conversation: Conversation) -> tuple[list[int], dict[int, Span]]:
        out = self._render(plain, conversation.source, return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True})
        ids, offsets = out["input_ids"], out["offset_mapping"]
        runs = []
        for start, stop in _runs(out["assistant_masks"]):
            # transformers ends the mask at the first token of the last character; an emoji is up to four tokens with one offset.
            while stop < len(ids) and offsets[stop] == offsets[stop - 1]:
                stop += 1
            runs.append((start, stop))
        turns = [i for i, message in enumerate(plain) if message["role"] == "assistant"]
        if len(runs) != len(turns):
            # transformers says nothing when it cannot place a mark: the turn would stay untrained, or the next user turn become trained
            raise DataError(
                f"the template's assistant mask has {len(runs)} runs of tokens, expected one for each of the {len(turns)} assistant "
                "turns: is each turn inside {% generation %}, with a token of its own before it?",
                conversation.source,
            )
        return ids, dict(zip(turns, runs, strict=True))

    def _by_prefix(self, plain: list[dict], conversation: Conversation) -> tuple[list[int], dict[int, Span]]:
        source = conversation.source
        full = self._render(plain, source)["input_ids"]
        spans = {}
        for index, message in enumerate(conversation.messages[: len(plain)]):
            if not message.train:
                continue  # an untrained turn need not be found, so its prefixes need not hold either
            if index == 0:
                raise DataError(
                    "got a trained assistant turn as the first message, expected a prompt before it: without {% generation %} in the "
                    "chat template its first token cannot be told from the header",
                    source,
                )
            before = self._render(plain[:index], source, add_generation_prompt=True)["input_ids"]
            upto = self._render(plain[: index + 1], source)["input_ids"]
            self._require_prefix(before, upto, index, source)
            self._require_prefix(upto, full, index, source)
            spans[index] = (len(before), len(upto))
        return full, spans

    def _require_prefix(self, prefix: list[int], whole: list[int], index: int, source: str) -> None:
        same = next((i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), min(len(prefix), len(whole)))
        if same == len(prefix):
            return
        got, expected = (self.tokenizer.decode(ids[same : same + 8]) for ids in (whole, prefix))
        raise DataError(
            f"messages[{index}]: the tokens before change once later text follows (the chat template rewrites earlier turns, or a token "
            f"reaches over the boundary), so the turn cannot be found by prefix (token {same}: got {got!r}, expected {expected!r}); "
            "use train_on=last, or mark the turns with {% generation %}",
            source,
        )

    def _end_of_turn(self, ids: Sequence[int], start: int, stop: int, source: str) -> int:
        """One past the end-of-turn token of the turn ids[start:stop], whether the template puts it in the turn or just behind it."""
        inside = [i for i in range(start, stop) if ids[i] in self.special]
        if inside and not self.tokenizer.decode(ids[inside[-1] + 1 : stop]).strip():
            return inside[-1] + 1  # a newline after the end token is the template's, no model has to say it
        if stop < len(ids) and ids[stop] in self.special and ids[stop] != self.bos:
            return stop + 1
        tail = self.tokenizer.decode(ids[max(start, stop - 8) : stop + 4])
        raise DataError(
            f"the chat template ends an assistant turn without a special token (got ...{tail!r}): the model would never learn to stop; "
            "add {{ eos_token }} after the content",
            source,
        )

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        for index, message in enumerate(conversation.messages):
            found = self._control.search(message.content)
            if found:
                # It would become the control token itself: a user text could open an assistant turn, or end one.
                raise DataError(
                    f"messages[{index}].content holds the tokenizer's control token {found.group()!r} at character {found.start() + 1}, "
                    "expected plain text: remove it, or split it with a space",
                    conversation.source,
                )

    def _render(self, plain: list[dict], source: str, **kwargs: Any):
        kwargs["tokenizer_kwargs"] = {"verbose": False, **kwargs.get("tokenizer_kwargs", {})}
        try:
            return self.tokenizer.apply_chat_template(plain, tokenize=True, return_dict=True, **kwargs)
        except Exception as error:  # jinja2's own errors, and whatever a template's raise_exception makes of a conversation
            raise DataError(f"the chat template refuses this conversation (roles {[m['role'] for m in plain]}): {error}", source) from error


def encode_all(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase, bad_lines: BadLines | None = None
) -> list[Sample]:
    """Every conversation as a Sample; those that do not fit go to `bad_lines`, whose policy decides."""
    bad_lines = BadLines() if bad_lines is None else bad_lines
    encoder = ConversationEncoder(tokenizer)
    samples = []
    for conversation in conversations:
        try:
            samples.append(encoder.encode(conversation))
        except DataError as error:
            bad_lines.add(error)
    bad_lines.check()
    if not samples:
        raise DataError("got no conversation that could be tokenised, expected at least one")
    return samples


def _runs(mask: Sequence[int]) -> list[Span]:
    """The stretches of ones: [0, 1, 1, 0, 1] -> [(1, 3), (4, 5)]."""
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))
