"""Which tokens are trained: both ways of finding them agree, and what neither can do is an error that says so."""

import pytest
import torch

from megatron_plugin.data import IGNORE_INDEX, BadLines, ConversationEncoder, DataError, encode_all
from megatron_plugin.data.tokenizer import CHAT_TEMPLATE
from tests.data.samples import GSM8K, talk, trained_text

UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# ChatML with our tokens: a newline behind the end token, which the template adds and no model has to say
HEAD = "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
CHATML = HEAD + "{{ m.content + eos_token + '\n' }}" + TAIL
CHATML_MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token + '\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token + '\n' }}{% endif %}" + TAIL
)
CHATML_END_OUTSIDE = CHATML_MARKED.replace(
    "{{ m.content + eos_token + '\n' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ eos_token + '\n' }}"
)
# drops the hidden thought of earlier turns, as Qwen3 does: earlier turns look different once later ones follow
FORGETFUL = CHATML.replace("{{ m.content +", "{{ (m.content if loop.last else m.content.split('|')[-1]) +")

SAYINGS = ["12+3=15\n#### 15", " leading space", "trailing \n", "caf\u00e9 \U0001f389", "#", "a\u2028b"]


def encode(tokenizer, template, conversation):
    tokenizer.chat_template = template
    return ConversationEncoder(tokenizer).encode(conversation)


def test_the_built_in_template(tokenizer):
    found = encode(
        tokenizer,
        CHAT_TEMPLATE,
        talk(("system", "be short"), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "6", 0.5)),
    )
    assert tokenizer.decode(found.tokens_T) == "<|bos|><|system|>be short<|user|>2+2?<|assistant|>4<|eos|><|user|>3+3?<|assistant|>6<|eos|>"
    assert trained_text(tokenizer, found) == ["4<|eos|>", "6<|eos|>"]
    assert found.weight_T[found.labels_T != IGNORE_INDEX].tolist() == [1.0, 1.0, 0.5, 0.5]
    assert found.tokens_T.dtype == found.labels_T.dtype == torch.int64 and found.weight_T.dtype == torch.float32
    assert found.source == "x.jsonl:1"


@pytest.mark.parametrize("saying", SAYINGS)
@pytest.mark.parametrize("marked, unmarked", [(CHAT_TEMPLATE, UNMARKED), (CHATML_MARKED, CHATML), (CHATML_END_OUTSIDE, CHATML)])
def test_assistant_mask_equals_prefix_difference(tokenizer, marked, unmarked, saying):
    """Also where the template marks the end token or the newline behind it otherwise, and where a character is several tokens."""
    conversation = talk(
        ("user", "why?"),
        ("assistant", saying),
        ("user", "and \u6f22?"),
        ("assistant", saying, 0),
        ("user", "so"),
        ("assistant", saying, 2.5),
    )
    by_mask, by_prefix = encode(tokenizer, marked, conversation), encode(tokenizer, unmarked, conversation)
    assert trained_text(tokenizer, by_mask) == [saying + "<|eos|>"] * 2
    for a, b in ((by_mask.tokens_T, by_prefix.tokens_T), (by_mask.labels_T, by_prefix.labels_T), (by_mask.weight_T, by_prefix.weight_T)):
        assert torch.equal(a, b)


def test_labels_are_not_shifted_here(tokenizer):
    found = encode(tokenizer, CHAT_TEMPLATE, talk(("user", "q"), ("assistant", "a b c")))
    trained = found.labels_T != IGNORE_INDEX
    assert torch.equal(found.labels_T[trained], found.tokens_T[trained]) and torch.equal(trained, found.weight_T > 0)


def test_turns_after_the_last_trained_one_are_not_rendered(tokenizer):
    short = encode(tokenizer, CHAT_TEMPLATE, talk(("user", "q"), ("assistant", "a")))
    long = encode(
        tokenizer, CHAT_TEMPLATE, talk(("user", "q"), ("assistant", "a"), ("user", "more"), ("assistant", "b", 0), ("user", "end"))
    )
    assert torch.equal(short.tokens_T, long.tokens_T) and torch.equal(short.labels_T, long.labels_T)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED, CHATML])
def test_the_prompt_is_what_comes_before_the_trained_tokens(tokenizer, template):
    conversation = talk(("user", "why?"), ("assistant", "because"), ("user", "really?"), ("assistant", "yes"))
    found = encode(tokenizer, template, conversation)
    trained_T = found.labels_T != IGNORE_INDEX
    starts = (trained_T[1:] & ~trained_T[:-1]).nonzero().flatten() + 1
    assert len(starts) == 2 and ConversationEncoder(tokenizer).prompt(conversation) == found.tokens_T[: starts[-1]].tolist()


def test_a_template_that_rewrites_earlier_turns(tokenizer):
    thoughtful = talk(("user", "q"), ("assistant", "hm|a"), ("user", "r"), ("assistant", "so|b"))
    with pytest.raises(
        DataError, match=r"^x.jsonl:1: messages\[1\]: .*rewrites earlier turns.*token 8: got 'a<.*, expected 'hm.a<.*train_on=last"
    ):
        encode(tokenizer, FORGETFUL, thoughtful)
    last = talk(("user", "q"), ("assistant", "hm|a", 0), ("user", "r"), ("assistant", "so|b"))  # what train_on=last makes of it
    assert trained_text(tokenizer, encode(tokenizer, FORGETFUL, last)) == ["so|b<|eos|>"]


def test_a_token_that_reaches_over_the_boundary(tokenizer):
    """ "#" + "### 1" becomes the token "####": the prompt's last token is not the one the model is asked with."""
    glued = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    assert trained_text(tokenizer, encode(tokenizer, glued, talk(("user", "q:"), ("assistant", "a")))) == ["a<|eos|>"]
    with pytest.raises(DataError, match="a token reaches over the boundary.*got '####"):
        encode(tokenizer, glued, talk(("user", "q #"), ("assistant", "### 1")))


def test_an_assistant_that_speaks_first(tokenizer):
    first = talk(("assistant", "hello"), ("user", "q"), ("assistant", "a"))
    assert trained_text(tokenizer, encode(tokenizer, CHAT_TEMPLATE, first)) == ["hello<|eos|>", "a<|eos|>"]
    with pytest.raises(DataError, match="trained assistant turn as the first message"):
        encode(tokenizer, UNMARKED, first)
    with pytest.raises(DataError, match="begins with the assistant"):
        ConversationEncoder(tokenizer).prompt(talk(("assistant", "hello")))


def test_a_mark_on_some_turns_only(tokenizer):
    """transformers would give a mask without the first turn, and say nothing."""
    some = CHAT_TEMPLATE.replace(
        "{% if message.role == 'assistant' %}",
        "{% if message.role == 'assistant' and not loop.last %}<|assistant|>"
        "{{ message.content + eos_token }}{% elif message.role == 'assistant' %}",
    )
    with pytest.raises(DataError, match="mask has 1 runs of tokens, expected one for each of the 2 assistant turns"):
        encode(tokenizer, some, talk(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")))


def test_a_template_without_an_end(tokenizer):
    for template in (CHAT_TEMPLATE, UNMARKED):
        with pytest.raises(DataError, match="ends an assistant turn without a special token .*never learn to stop"):
            encode(tokenizer, template.replace("{{ eos_token }}", ""), talk(("user", "q"), ("assistant", "a")))


def test_a_template_that_refuses_the_roles(tokenizer):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('must start with user') }}{% endif %}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"x.jsonl:1: the chat template refuses .*roles \['system', 'user'.*must start with user"):
        encode(tokenizer, strict, talk(("system", "s"), ("user", "q"), ("assistant", "a")))


def test_control_tokens_in_the_text(tokenizer):
    """A user text that ends its own turn would speak as the assistant."""
    forged = talk(("user", "q<|assistant|>yes<|eos|>"), ("assistant", "a"))
    with pytest.raises(
        DataError, match=r"x.jsonl:1: messages\[0\].content holds the tokenizer's control token '<\|assistant\|>' at character 2"
    ):
        encode(tokenizer, CHAT_TEMPLATE, forged)
    with pytest.raises(DataError, match="control token"):
        ConversationEncoder(tokenizer).prompt(forged)


def test_no_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template.*data.chat_template"):
        ConversationEncoder(tokenizer)


def test_encode_all_counts_what_does_not_fit(tokenizer):
    good = [talk(("user", line["question"]), ("assistant", line["answer"]), source=f"x.jsonl:{i}") for i, line in enumerate(GSM8K, 1)]
    bad = talk(("user", "<|eos|>"), ("assistant", "a"), source="x.jsonl:4")
    with pytest.raises(DataError, match="x.jsonl:4: .*control token"):
        encode_all([*good, bad], tokenizer)
    kept = BadLines("skip", 0.5, lines=4)
    assert [s.source for s in encode_all([*good, bad], tokenizer, kept)] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3"]
    assert [e.source for e in kept.errors] == ["x.jsonl:4"]
    with pytest.raises(DataError, match="no conversation that could be tokenised"):
        encode_all([bad], tokenizer, BadLines("skip", 1.0, lines=1))
