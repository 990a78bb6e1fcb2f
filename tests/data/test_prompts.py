"""Prompts for rollouts: none is left out without a name."""

import pytest

from megatron_plugin.data import BadLines, DataError, encode_prompts
from tests.data.samples import talk


def test_what_is_left_out_is_named(tokenizer):
    conversations = [
        talk(("user", "hi"), ("assistant", "ho"), source="f:1"),
        talk(("assistant", "I begin"), source="f:2"),
        talk(("user", "x " * 500), ("assistant", "ho"), source="f:3"),
        talk(("user", "a<|eos|>"), ("assistant", "ho"), source="f:4"),
    ]
    bad = BadLines("skip", 0.5, lines=4)
    found = encode_prompts(conversations, tokenizer, longest=100, bad_lines=bad)
    assert [prompt.source for prompt in found.prompts] == ["f:1"] and (found.too_long, found.unasked) == (("f:3",), ("f:2",))
    assert [error.source for error in bad.errors] == ["f:4"]
    assert str(found).endswith("1 left out as too long, 1 as beginning with the answer")
    with pytest.raises(DataError, match="f:4: .*control token"):
        encode_prompts(conversations, tokenizer, longest=100)
    with pytest.raises(DataError, match=r"no prompt to sample from.*\(0 are longer, 1 begin with the answer\)"):
        encode_prompts(conversations[1:2], tokenizer, longest=100)
