"""The whole way from a jsonl file to rows, with one ledger of everything left out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_plugin.data.errors import BadLines
from megatron_plugin.data.messages import read_conversations
from megatron_plugin.data.packing import PackedRows, pack_samples
from megatron_plugin.data.tokenize import encode_all
from megatron_plugin.data.tokenizer import pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_rows"]


def load_rows(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    *,
    train_on: str = "all",
    packing: bool = True,
    overlong: str = "error",
    bad_lines: BadLines | None = None,
) -> PackedRows:
    """jsonl -> conversations -> samples -> rows.  Every rank that calls it gets the same rows.

    Keep the `bad_lines` you pass: it counts over all three stages (`len(bad_lines)` is the metric data/bad_lines).  Raises DataError.
    """
    bad_lines = BadLines() if bad_lines is None else bad_lines
    conversations = read_conversations(path, train_on=train_on, bad_lines=bad_lines)
    samples = encode_all(conversations, tokenizer, bad_lines)
    return pack_samples(samples, seq_length, pad_id=pad_id(tokenizer), packing=packing, overlong=overlong, bad_lines=bad_lines)
