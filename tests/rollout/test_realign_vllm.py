"""`megatron-plugin realign` as a person starts it, with a real vLLM: the engine has the directory's weights, not random ones."""

import json

import torch

from megatron_plugin import cli
from megatron_plugin.data import ConversationEncoder, parse_line, train_tokenizer, true_vocab_size
from tests.rollout.vllm_models import make_model

MAX_TOKENS = 12
LINES = [json.dumps({"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"}) for i in range(24)]


def greedy(model, ids, ends):
    """What Hugging Face's forward says, up to an end; None where none comes."""
    said = []
    while len(said) < MAX_TOKENS:
        with torch.no_grad():
            said.append(int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
        if said[-1] in ends:
            return said
    return None


def test_own_answers_are_those_of_the_directorys_weights(vllm, tmp_path, capsys):
    """The reward, the length of an answer, verifies all that have a text.  For the others the analysis prompt is longer than the context."""
    tokenizer = train_tokenizer(["What is 1 + 2? #### 3"] * 4, tmp_path / "hf", vocab_size=300)
    ends = list(range(20, 260, 9))
    model = make_model(tmp_path / "hf", "llama", vocab_size=true_vocab_size(tokenizer), eos_token_id=ends)
    with torch.no_grad():  # random bytes are no text, and an answer that is none is rejected: logit 0 for what is not ASCII
        model.lm_head.weight[[i for i in range(model.config.vocab_size) if not tokenizer.decode([i]).isascii()]] = 0
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "x.jsonl").write_text("\n".join(LINES) + "\n")
    options = ("--reward", "tests.rollout.user_rewards.length", "--max-tokens", str(MAX_TOKENS), "--concurrency", "8", "--context", "400")
    code = cli.main(["realign", str(tmp_path / "x.jsonl"), str(tmp_path / "hf"), "--out", str(tmp_path / "out"), *options])
    print(capsys.readouterr())
    outcomes = [json.loads(line) for line in (tmp_path / "out" / "outcomes.jsonl").read_text().splitlines()]
    assert code == 0 and [x["line"] for x in outcomes] == list(range(1, 25))
    encoder, checked = ConversationEncoder(tokenizer), 0
    for line, outcome in zip(LINES, outcomes, strict=True):
        expected = greedy(model, encoder.prompt(parse_line(line)), {*ends, tokenizer.eos_token_id})
        if outcome["kind"] == "own":
            record = outcome["record"]
            assert record["tokens"] == len(expected)
            assert record["messages"][-1]["content"] == tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            checked += len(expected) > 1
        else:
            assert outcome["reason"].startswith("hint too long: the hinted prompt has ") and outcome["reason"].endswith("the context holds 400")
    assert checked >= 6, "too few answers of several tokens: this test could not fail"
