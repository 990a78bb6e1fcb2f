"""Are two tokenizers the same?  The engine looks for the splitter with one, its caller makes prompts and texts with another."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKENIZER", "fingerprint"]

TOKENIZER = "megatron_plugin_tokenizer"  # key of vLLM's --additional-config: the tokenizer's folder


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its tokens and their ids, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
