"""Expert data realigned by a scripted model: which answers are kept, which are rejected and why, and that the trainer can read what comes out."""

import json

import pytest

from megatron_plugin.data import ConversationEncoder, DataError, parse_line, read_conversations, train_tokenizer
from megatron_plugin.rollout.engine import Completion, EngineLostError, SamplingParams
from megatron_plugin.rollout.hinted.realign import Realigner, RealignOptions, realign
from megatron_plugin.rollout.hinted.stops import EndReason
from megatron_plugin.rollout.rewards import RewardError, make_reward
from tests.rollout.scripted import Scripted

QUESTION = "What is {} + {}?"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [QUESTION.format(1, 2), "#### 3 # CoT reference answer question analysis é 漢"] * 4
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t", vocab_size=300)


def lines(count):
    return [parse_line(json.dumps({"question": QUESTION.format(i, 1), "answer": f"It is {i + 1}.\n#### {i + 1}"}), f"gsm.jsonl:{i + 1}") for i in range(count)]


@pytest.fixture
def work(tokenizer):
    """work(scripted, **options): all results, and the realigner."""

    def go(scripted, items, *, done=(), **fields):
        reward = make_reward("numeric")
        realigner = Realigner(scripted, reward, RealignOptions(**fields))
        out = list(realign(items, realigner, done=done))
        reward.close()
        return out, realigner

    return go


def test_own_hinted_and_rejected(tokenizer, work, tmp_path):
    q = [QUESTION.format(i, 1) for i in range(5)]
    model = Scripted(
        tokenizer,
        alone={q[0]: "one é\n#### 1", q[1]: "#### 9", q[4]: ("#### 5 and on and", "length")},
        analysis={q[1]: "first # CoT\nthen # CoT\n tail", q[2]: "no marker", q[3]: "x # CoT", q[4]: "y # CoT"},
        hinted={q[1]: "so 2\n#### 2", q[3]: "so 7\n#### 7", q[4]: "#### 5"},
    )
    out, realigner = work(model, lines(5))
    assert [r.kind for r in out] == ["own", "hinted", "rejected", "rejected", "hinted"] and [r.source for r in out] == [f"gsm.jsonl:{i}" for i in range(1, 6)]
    assert out[2].reason.startswith("no analysis: the model wrote 9 characters without a line '# CoT'")
    assert out[3].reason == "not verified: wrong (reward 0)" and out[3].record is None
    assert out[1].record["end_reason"] == "eos" and out[1].record["split_at"] == 3 and out[1].record["attempts"] == 2
    assert realigner.counts == {"own": 1, "hinted": 2, "rejected": 2, "rejected: no analysis": 1, "rejected: not verified": 1}
    assert [r.end_reason for r in out] == ["", "eos", "", "eos", "eos"], "of hinted answers, kept or not"
    assert realigner.tokens > sum(r.record["tokens"] for r in out if r.record)
    assert not any(kind[0] == "analysis" and kind[1] == q[0] for kind in model.asked), "a verified answer costs no analysis"
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(r.record) + "\n" for r in out if r.record))
    back = read_conversations(path)
    assert [c.messages[-1].content for c in back] == ["one é\n#### 1", "so 2\n#### 2", "#### 5"] and [c.messages[0].content for c in back] == [q[0], q[1], q[4]]
    own = ConversationEncoder(tokenizer).encode(back[0])
    assert (own.labels_T != -100).sum() == out[0].record["tokens"], "as many trained tokens as were drawn"


def test_the_hinted_prompt(tokenizer, work):
    """Question, expert's answer, and the analysis up to the last marker; the key, and with it the seed, is the sample's source."""
    q = QUESTION.format(0, 1)
    model = Scripted(tokenizer, analysis={q: "first # CoT\nthen # CoT\n tail"}, hinted={q: "#### 1"})
    work(model, lines(1), unaided=None)
    (_, _, key, hinted), = [asked for asked in model.asked if asked[0] == "hinted"]
    assert key == "gsm.jsonl:1" and hinted.endswith("<|assistant|>first # CoT\nthen # CoT\n") and q in hinted and "It is 1." in hinted
    assert ("alone", q) not in model.asked


def test_everything_bad_has_a_reason(tokenizer, work):
    q = [QUESTION.format(i, 1) for i in range(6)]
    model = Scripted(
        tokenizer, analysis={q[0]: None, **dict.fromkeys(q[1:], "# CoT")}, max_model_len=400,
        hinted={q[1]: None, q[2]: ("#### 3", EndReason.REPEATING), q[3]: ("#### 4", EndReason.LENGTH), q[4]: "<|user|>\n#### 5"},
    )  # fmt: skip
    long = parse_line(json.dumps({"question": QUESTION.format(9, 1), "answer": "long " * 300 + "#### 10"}), "gsm.jsonl:8")
    bad = DataError("missing key 'answer'", "gsm.jsonl:7")
    out, realigner = work(model, [*lines(5), bad, long], unaided=None)
    assert [r.reason.partition(":")[0] for r in out] == [
        "refused", "not decoded", "unfinished", "unfinished", "cannot be trained on", "bad sample", "hint too long",
    ]  # fmt: skip
    assert "ended by repeating" in out[2].reason and "ended by length" in out[3].reason and "fell out of step" in out[1].reason
    assert out[5].source == "gsm.jsonl:7" and realigner.counts["rejected"] == 7 and realigner.counts["own"] + realigner.counts["hinted"] == 0


def unanswered(number, answer="I do not know."):
    return parse_line(json.dumps({"question": QUESTION.format(number, 1), "answer": answer}), f"gsm.jsonl:{number + 1}")


def test_an_expert_without_an_answer_is_rejected_and_costs_nothing(tokenizer, work):
    """Also where nothing else is left, as at the end of a run that goes on: the reward itself would end the run there."""
    model = Scripted(tokenizer, alone={QUESTION.format(0, 1): "#### 1"})
    out, realigner = work(model, [*lines(1), unanswered(1)])
    assert [r.kind for r in out] == ["own", "rejected"] and realigner.counts["rejected: no answer"] == 1
    assert out[1].reason == "no answer: the reward 'numeric' finds nothing to verify by in the expert's 'I do not know.'"
    asked = len(model.asked)
    out, _ = work(model, [unanswered(i) for i in range(40)])
    assert {r.reason.partition(":")[0] for r in out} == {"no answer"} and len(model.asked) == asked


def test_a_reward_that_fails_is_no_fault_of_the_data(tokenizer):
    reward = make_reward("tests.rollout.user_rewards.always_raises", workers=1)
    with pytest.raises(RewardError, match="judged none"):
        Realigner(Scripted(tokenizer), reward).batch(lines(2))
    reward.close()


def test_a_run_goes_on_where_it_was(tokenizer, work):
    model = Scripted(tokenizer, alone={QUESTION.format(i, 1): f"#### {i + 1}" for i in range(7)})
    out, _ = work(model, lines(7), done={"gsm.jsonl:2", "gsm.jsonl:5"}, batch=2)
    assert [r.source for r in out] == [f"gsm.jsonl:{i}" for i in (1, 3, 4, 6, 7)] and {r.kind for r in out} == {"own"}


def test_of_several_unaided_answers_the_first_verified_is_kept(tokenizer, work):
    model = Scripted(tokenizer)
    said = ["#### 5", "second\n#### 1", "third\n#### 1"]

    def generate(prompt_ids, params, *, timeout_s):
        ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) + (tokenizer.eos_token_id,) for text in said[: params.n]]
        return [Completion(i, (0.0,) * len(i), "stop", 1) for i in ids]

    model.generate = generate
    out, _ = work(model, lines(1), unaided=SamplingParams(max_tokens=20, n=3, temperature=1.0))
    assert out[0].kind == "own" and out[0].record["messages"][-1]["content"] == "second\n#### 1"


def test_a_lost_engine_ends_it(tokenizer, work):
    model = Scripted(tokenizer, lost=True)
    with pytest.raises(EngineLostError, match="found dead"):
        work(model, lines(3))


@pytest.mark.parametrize("fields", [dict(batch=0), dict(analysis_max_tokens=0), dict(marker="")])
def test_bad_options(fields):
    with pytest.raises(ValueError, match="expected at least 1, 1, text"):
        RealignOptions(**fields)


def test_earlier_turns_and_weights_are_kept_and_shown(tokenizer, work):
    """What is not to be trained stays so, and the hinted stream sees the conversation that the plain one sees."""
    q = QUESTION.format(3, 1)
    talk = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi\n", "weight": 0},
            {"role": "user", "content": q}, {"role": "assistant", "content": "It is 4.\n#### 4", "weight": 0.5}]  # fmt: skip
    model = Scripted(tokenizer, analysis={q: "# CoT"}, hinted={q: "so\n#### 4"})
    (result,), _ = work(model, [parse_line(json.dumps({"messages": talk}), "gsm.jsonl:1")], unaided=None)
    assert result.record["messages"] == [*talk[:4], {"role": "assistant", "content": "so\n#### 4", "weight": 0.5}]
    (hinted,) = [asked[3] for asked in model.asked if asked[0] == "hinted"]
    assert "be short" in hinted and hinted.index("hello") < hinted.index("hi\n") < hinted.index(q)


def test_an_answer_with_a_cut_character_is_rejected(tokenizer, work):
    q = QUESTION.format(0, 1)
    (result,), _ = work(Scripted(tokenizer, analysis={q: "# CoT"}, hinted={q: "h\ufffd\n#### 1"}), lines(1), unaided=None)
    assert result.kind == "rejected" and "cannot be trained on: the answer holds a character that was cut off" in result.reason


def test_a_template_without_a_system_turn_is_a_reason(tokenizer, work, monkeypatch):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    q = QUESTION.format(0, 1)
    out, _ = work(Scripted(tokenizer, alone={q: "#### 1"}), lines(2))
    assert out[0].kind == "own" and out[1].kind == "rejected" and out[1].reason.startswith("hint refused: ") and "no system turn" in out[1].reason
