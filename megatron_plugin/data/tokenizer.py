"""A Hugging Face tokenizer from a local directory, or a byte-level BPE trained on the training text and saved as such a directory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_plugin.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer", "pad_id", "special_ids", "train_tokenizer", "true_vocab_size"]

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
ROLE_TOKENS = {"user": "<|user|>", "assistant": "<|assistant|>", "system": "<|system|>", "tool": "<|tool|>"}

# Every boundary is a special token, so no merge can reach over it: a prompt's ids are a prefix of the whole conversation's ids.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% elif message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'tool' %}<|tool|>{{ message.content }}"
    "{% else %}<|system|>{{ message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_tokenizer(directory: str | Path, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a local directory; never the network, never code from the directory.

    `chat_template`: a Jinja text that replaces the directory's own, for base models that come without one.
    """
    path = Path(directory)
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing there"
        remedy = "give a directory holding tokenizer.json, or leave data.tokenizer empty to train a byte-level BPE"
        raise DataError(f"no tokenizer (got {what}, expected a Hugging Face tokenizer directory): {remedy}", str(directory))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for one and the same cause
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "no files"
        raise DataError(
            f"cannot load a tokenizer (got {found}, expected tokenizer.json and tokenizer_config.json): {error}", str(directory)
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def train_tokenizer(texts: Iterable[str], directory: str | Path, *, vocab_size: int = 1024) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `texts`, save it as a Hugging Face directory, and return it as loaded from there.

    The same texts give the same bytes of tokenizer.json (BPE draws no random numbers: there is no seed).  Each digit is a token of its own.
    The vocabulary is `vocab_size` tokens or fewer when the text has no more pairs to merge: ask `true_vocab_size`.  The directory appears
    at once, complete; one that exists already is replaced.  Call it on one rank, and load on the others after a barrier.
    """
    smallest = 256 + 3 + len(ROLE_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least {smallest} (256 bytes and {smallest - 256} special tokens)")
    tokenizer = _train_bpe(texts, vocab_size)
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        built = Path(temporary) / "tokenizer"
        _save(tokenizer, built)
        if target.exists():
            shutil.rmtree(target)
        os.replace(built, target)
    return load_tokenizer(target)


def true_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id: what the embedding needs before any padding.  len(tokenizer) is too small where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows up.  No loss ever sees it, so without a padding token the end token serves, and else 0."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of control tokens: the named ones and every added token marked special (transformers lists only the named ones)."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _train_bpe(texts: Iterable[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Single digits: merged numbers would hide carries from a small model, and split 1234 differently from 234.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS, *ROLE_TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is ever unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save(tokenizer, directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(directory))
    config_file = directory / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    # transformers 5 writes a class name that transformers 4 (older vLLM) does not know; both know this one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
