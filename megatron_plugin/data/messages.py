"""jsonl lines into one internal form, or an error that names the line.

A line is one of
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "...", "weight": 0.5}, ...]}
    {"question": "...", "answer": "..."}                    GSM8K's form
    {"prompt": "...", "response": "..."}
Other top-level keys (ids, tags) are ignored; keys that would change the training if they were ignored are errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_plugin.data.errors import BadLines, DataError
from megatron_plugin.data.lines import numbered_lines

__all__ = ["Conversation", "Message", "iter_lines", "parse_line", "read_conversations"]

ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = {"messages": ("messages",), "question/answer": ("question", "answer"), "prompt/response": ("prompt", "response")}
# Ignoring these would silently train on something else than the author wrote.
MEANINGFUL_TOP = {"weight": "a weight belongs on a message of the 'messages' form", "tools": "tool definitions are not supported"}
MEANINGFUL_MESSAGE = ("tool_calls", "function_call", "reasoning_content", "thinking")


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str
    train: bool = False
    """True where the loss applies: assistant turns chosen by train_on whose weight is not 0."""
    weight: float = 1.0
    """Finite and >= 0: multiplies the loss of each token of this turn."""


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    source: str = "<memory>"
    """file:line"""


def read_conversations(path: str | Path, *, train_on: str = "all", bad_lines: BadLines | None = None) -> list[Conversation]:
    """All conversations of a jsonl file.  `train_on`: "all" assistant turns or the "last" one.

    Raises DataError "file:line: reason" as `bad_lines` says (default: any bad line), and when nothing is left to train on.
    """
    bad_lines = BadLines() if bad_lines is None else bad_lines
    good = []
    for item in iter_lines(path, train_on=train_on):
        bad_lines.lines += 1
        if isinstance(item, DataError):
            bad_lines.add(item)
        else:
            good.append(item)
    bad_lines.check()
    if not good:
        raise DataError("got no usable line, expected at least one conversation: is this the right file?", str(path))
    return good


def iter_lines(path: str | Path, *, train_on: str = "all") -> Iterator[Conversation | DataError]:
    """One item per line, in file order: the conversation, or the error (not raised) that says what is wrong with it."""
    if train_on not in ("all", "last"):
        raise ValueError(f"train_on: got {train_on!r}, expected 'all' or 'last'")
    for number, line in numbered_lines(path):
        try:
            yield line if isinstance(line, DataError) else parse_line(line, f"{path}:{number}", train_on=train_on)
        except DataError as error:
            yield error


def parse_line(line: bytes | str, source: str = "<memory>", *, train_on: str = "all") -> Conversation:
    """One line as a Conversation; DataError when it is not one of the accepted forms."""
    record = _record(line, source)
    complete = [form for form, keys in FORMS.items() if all(key in record for key in keys)]
    if len(complete) != 1:
        raise DataError(_form_reason(record, complete), source)
    for key, why in MEANINGFUL_TOP.items():
        if key in record:
            raise DataError(f"got the top-level key '{key}': {why}", source)
    if complete == ["messages"]:
        messages = _messages(record["messages"], source)
    else:
        asked, answered = FORMS[complete[0]]
        messages = [
            Message("user", _text(record[asked], f"'{asked}'", source)),
            Message("assistant", _text(record[answered], f"'{answered}'", source), train=True),
        ]
    return Conversation(tuple(_choose_trained(messages, train_on, source)), source)


class _RepeatedKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # json.loads would keep the last value and say nothing
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # once: json.loads would build one for each line


def _record(line: bytes | str, source: str) -> dict[str, Any]:
    if not line.strip():
        raise DataError("empty line (expected one JSON object per line)", source)
    try:
        record = _DECODER.decode(line.decode("utf-8") if isinstance(line, bytes) else line)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (got byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line)", source) from None
    except json.JSONDecodeError as error:
        around = _show(error.doc[max(0, error.pos - 20) : error.pos + 20])
        raise DataError(f"not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1} (got {around})", source) from None
    except _RepeatedKeyError as error:
        raise DataError(f"an object has one key twice (got {_show(str(error))}, expected each key once): which value is meant?", source) from None
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of more than 4300 digits
        raise DataError(f"not usable JSON: {error}", source) from None
    if not isinstance(record, dict):
        raise DataError(f"got a JSON {_kind(record)}, expected an object with one of the forms {', '.join(FORMS)}", source)
    return record


def _form_reason(record: dict[str, Any], complete: list[str]) -> str:
    if complete:
        return f"ambiguous: the line has the forms {' and '.join(complete)}, expected exactly one"
    missing = [f"'{key}' (of {form})" for form, keys in FORMS.items() if set(keys) & set(record) for key in keys if key not in record]
    if missing:
        return f"missing key {', '.join(missing)} (got keys {_show(sorted(record))})"
    return f"unknown form (got keys {_show(sorted(record))}, expected messages, question and answer, or prompt and response)"


def _messages(value: Any, source: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"'messages' is wrong (got {_kind(value)} {_show(value)}, expected a list of at least one message)", source)
    return [_message(item, index, source) for index, item in enumerate(value)]


def _message(item: Any, index: int, source: str) -> Message:
    where = f"messages[{index}]"
    if not isinstance(item, dict):
        raise DataError(f"{where} is wrong (got {_kind(item)} {_show(item)}, expected an object with role and content)", source)
    for key in ("role", "content"):
        if key not in item:
            raise DataError(f"{where} has no '{key}' (got keys {_show(sorted(item))})", source)
    role = item["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}.role is wrong (got {_show(role)}, expected one of {', '.join(ROLES)})", source)
    for key in MEANINGFUL_MESSAGE:
        if item.get(key):
            raise DataError(f"{where} has '{key}', which is not supported: write it into content as the model should say it", source)
    # Only what the loss sees must hold text: an empty system prompt or tool result is context as good as any.
    content = _text(item["content"], f"{where}.content", source, may_be_empty=role in ("system", "developer", "tool"))
    weight = _weight(item.get("weight"), where, source)
    if "weight" in item and role != "assistant":
        raise DataError(f"{where} has a weight (got {_show(item['weight'])} on role '{role}', expected it on assistant turns only)", source)
    return Message(role, content, train=role == "assistant" and weight > 0.0, weight=weight)


def _choose_trained(messages: list[Message], train_on: str, source: str) -> list[Message]:
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise DataError(f"no assistant turn (got roles {_show([m.role for m in messages])}): there is nothing to train on", source)
    chosen = turns if train_on == "all" else turns[-1:]
    if not any(messages[i].train for i in chosen):
        raise DataError(f"no turn to train on (got weight 0 on each chosen assistant turn, train_on={train_on})", source)
    return [Message(m.role, m.content, m.train and i in chosen, m.weight) for i, m in enumerate(messages)]


def _text(value: Any, where: str, source: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is wrong (got {_kind(value)} {_show(value)}, expected a string)", source)
    if not may_be_empty and not value.strip():
        raise DataError(f"{where} is empty (got {_show(value)}, expected text)", source)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half a surrogate pair at character {error.start + 1}, which no tokenizer can read", source) from None
    return value


def _weight(value: Any, where: str, source: str) -> float:
    if value is None:
        return 1.0
    expected = "expected a finite number >= 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where}.weight is wrong (got {_kind(value)} {_show(value)}, {expected})", source)
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight) or weight < 0.0 or weight > 3.4e38:  # beyond that it is inf in fp32
        raise DataError(f"{where}.weight is wrong (got {_show(value)}, {expected})", source)
    return weight


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
