"""Whether a tokenizer, a model and data go together: true vocabulary, padding, control tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_plugin.config import Config
from megatron_plugin.data import load_tokenizer, true_vocab_size
from megatron_plugin.data.tokenizer import special_ids

__all__ = ["vocabulary_lines"]


def vocabulary_lines(directory: str | Path, config: Config | None = None) -> Iterator[tuple[bool, str]]:
    """(is it as it should be, what is said) about a tokenizer directory, and about a model of `config` that gets its ids.

    DataError where no tokenizer can be loaded."""
    template = config.data.chat_template if config else ""
    tokenizer = load_tokenizer(directory, chat_template=Path(template).read_text("utf-8") if template else None)
    size, control = true_vocab_size(tokenizer), special_ids(tokenizer)
    gaps = size - len(tokenizer.get_vocab())
    yield True, f"{size} ids" + (f", {gaps} of them without a token" if gaps else "") + f"; {len(control)} are control tokens"
    for kind, needed in (("eos", "an answer ends with it"), ("pad", "rows are filled up with the end token"), ("bos", "not needed")):
        token = getattr(tokenizer, f"{kind}_token")
        yield token is not None or kind != "eos", f"{kind}: {token!r} ({getattr(tokenizer, f'{kind}_token_id')})" if token else f"{kind}: none; {needed}"
    if not tokenizer.chat_template:
        yield False, "chat template: none, and conversations need one: data.chat_template=FILE"
    else:
        marked = "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template)
        yield True, f"chat template: of {len(str(tokenizer.chat_template))} characters, {'with' if marked else 'without'} marks around what is trained on"
    if config is not None:
        yield from _model_lines(size, config)
    yield from _embedding_lines(Path(directory), size)


def _model_lines(size: int, config: Config) -> Iterator[tuple[bool, str]]:
    """The rows of the embedding that training would make (trainer/model.py), and what of them is padding."""
    multiple = math.lcm(config.gpt.make_vocab_size_divisible_by, config.parallel.tensor)
    rows = -(-size // multiple) * multiple
    parts = f", {rows // config.parallel.tensor} on each of {config.parallel.tensor} tensor-parallel ranks" if config.parallel.tensor > 1 else ""
    yield True, f"model: {rows} rows of the embedding{parts} (a multiple of {multiple}); {rows - size} are padding, which the loss masks"
    if rows > 2 * size:
        yield False, f"model: more than half of these rows are padding: model.make_vocab_size_divisible_by={config.gpt.make_vocab_size_divisible_by} is large"


def _embedding_lines(directory: Path, size: int) -> Iterator[tuple[bool, str]]:
    """Beside a Hugging Face model's config.json: whether its embedding has a row for every id."""
    if not (directory / "config.json").is_file():
        return
    from megatron_plugin.hooks.weights.hf_config import read_hf_config

    found: Any = read_hf_config(directory).get("vocab_size")
    if isinstance(found, int):
        fits = found >= size
        text = f"{found - size} rows more than ids" if fits else f"but ids go up to {size - 1}: not the tokenizer of this model"
        yield fits, f"config.json: vocab_size {found}, {text}"
