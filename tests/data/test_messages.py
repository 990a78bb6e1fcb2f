"""Each accepted form, and `file:line: reason` for each kind of damage."""

import json

import pytest

from megatron_plugin.data import BadLines, DataError, Message, iter_lines, parse_line, read_conversations
from tests.data.samples import GSM8K, write_jsonl

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}
GOOD = {"prompt": "a", "response": "b"}


def messages(*items, **more) -> dict:
    return {"messages": list(items), **more}


def weighted(value) -> dict:
    return messages(USER, {**ASSISTANT, "weight": value})


def raw_weight(text: str) -> bytes:
    return json.dumps(weighted("W")).replace('"W"', text).encode()


@pytest.mark.parametrize(
    "line, user, assistant",
    [
        ({"prompt": "a ", "response": " b\n"}, "a ", " b\n"),  # whitespace is the author's business
        ({"question": "q", "answer": "1\n#### 1", "id": 7}, "q", "1\n#### 1"),
        (messages(USER, ASSISTANT), "hi", "ho"),
        (GSM8K[2], GSM8K[2]["question"], GSM8K[2]["answer"]),
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_forms(line, user, assistant, ascii_only):
    found = parse_line(json.dumps(line, ensure_ascii=ascii_only).encode(), "f:1")
    assert found.messages == (Message("user", user), Message("assistant", assistant, train=True)) and found.source == "f:1"


@pytest.mark.parametrize("train_on, trained", [("all", [False, False, True, False, True, False]), ("last", [False] * 4 + [True, False])])
def test_which_turns_are_trained(train_on, trained):
    system = {"role": "system", "content": ""}
    found = parse_line(json.dumps(messages(system, USER, ASSISTANT, USER, {**ASSISTANT, "weight": 0.25}, USER)), train_on=train_on)
    assert [m.train for m in found.messages] == trained
    assert found.messages[4].weight == 0.25 and found.messages[2].weight == 1.0


def test_weight_0_means_untrained():
    found = parse_line(json.dumps(messages(USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": None})))
    assert [m.train for m in found.messages] == [False, False, False, True]


DAMAGE = {
    "cut": (b'{"prompt": "a", "respon', r"not valid JSON: Unterminated string.* at character 17 \(got .*respon"),
    "two objects": (b'{"prompt": "a", "response": "b"}{"prompt": "a"', "not valid JSON: Extra data"),
    "nul bytes": (b"\0" * 40, "not valid JSON"),
    "empty": (b"", "empty line"),
    "blank": (b"  \t\r", "empty line"),
    "latin-1": ('{"prompt": "caf\u00e9", "response": "b"}'.encode("latin-1"), r"not UTF-8 \(got byte 0xe9 at byte 16"),
    "surrogate": (rb'{"prompt": "a", "response": "b\ud83d"}', "'response' has half a surrogate pair at character 2"),
    "deep": (b"[" * 100_000, "not usable JSON"),
    "huge number": (b'{"prompt": ' + b"1" * 5000 + b"}", "not usable JSON"),
    "a key twice": (b'{"prompt": "a", "response": "b", "response": "c"}', r"an object has one key twice .got 'response', expected each key once"),
    "a key twice inside": (b'{"prompt": "a", "response": "b", "meta": [{"id": 1, "id": 1}]}', "one key twice .got 'id'"),
    "array": (["a", "b"], r"got a JSON list, expected an object"),
    "null": (None, r"got a JSON null, expected an object"),
    "unknown form": ({"text": "a"}, r"unknown form \(got keys \['text'\]"),
    "sharegpt": ({"conversations": []}, "unknown form"),
    "no response": ({"prompt": "a"}, r"missing key 'response' \(of prompt/response\)"),
    "two forms": ({**GOOD, "question": "a", "answer": "b"}, "ambiguous: .* question/answer and prompt/response, expected exactly one"),
    "answer is a number": ({"question": "a", "answer": 7}, "'answer' is wrong .got number 7, expected a string"),
    "empty answer": ({"question": "a", "answer": " \n"}, r"'answer' is empty"),
    "messages is a string": ({"messages": "hi"}, "'messages' is wrong .got string 'hi', expected a list"),
    "no messages": ({"messages": []}, "'messages' is wrong"),
    "message is a string": (messages(USER, "ho"), r"messages\[1\] is wrong .got string"),
    "no role": (messages(USER, {"content": "a"}), r"messages\[1\] has no 'role'"),
    "no content": (messages(USER, {"role": "assistant"}), r"messages\[1\] has no 'content'"),
    "wrong role": (messages({"role": "human", "content": "a"}, ASSISTANT), r"messages\[0\].role is wrong .got 'human', expected one of"),
    "role is a list": (messages({"role": [], "content": "a"}, ASSISTANT), r"messages\[0\].role is wrong"),
    "content null": (messages(USER, {**ASSISTANT, "content": None}), r"messages\[1\].content is wrong .got null"),
    "content parts": (messages(USER, {**ASSISTANT, "content": [{"type": "text"}]}), r"messages\[1\].content is wrong .got list"),
    "content empty": (messages(USER, {**ASSISTANT, "content": ""}), r"messages\[1\].content is empty"),
    "no assistant": (messages(USER, USER), r"no assistant turn .got roles \['user', 'user'\]"),
    "tool calls": (messages(USER, {**ASSISTANT, "tool_calls": [1]}), "tool_calls.*not supported"),
    "tools": (messages(USER, ASSISTANT, tools=[]), "top-level key 'tools'"),
    "top-level weight": ({**GOOD, "weight": 2}, "top-level key 'weight'"),
    "weight nan": (raw_weight("NaN"), r"messages\[1\].weight is wrong .got nan, expected a finite number >= 0"),
    "weight inf": (raw_weight("-Infinity"), r"weight is wrong .got -inf"),
    "weight 1e400": (raw_weight("1e400"), r"weight is wrong .got inf"),
    "weight beyond fp32": (raw_weight("1e39"), r"weight is wrong .got 1e\+39"),
    "weight of 400 digits": (raw_weight("1" * 400), r"weight is wrong .got 1111"),
    "weight negative": (weighted(-0.5), r"weight is wrong .got -0.5"),
    "weight string": (weighted("1"), r"weight is wrong .got string '1'"),
    "weight true": (weighted(True), r"weight is wrong .got boolean True"),
    "weight on the user": (messages({**USER, "weight": 1}, ASSISTANT), r"messages\[0\] has a weight"),
    "all weights 0": (weighted(0), "no turn to train on"),
}


@pytest.mark.parametrize("line, reason", DAMAGE.values(), ids=DAMAGE)
def test_damage_names_file_line_and_reason(tmp_path, line, reason):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, GOOD, line, GOOD])
    with pytest.raises(DataError, match=reason) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:3: ") and caught.value.source == f"{path}:3" and caught.value.exit_code == 4
    assert len(str(caught.value)) < 500, "the message must not print the whole line"
    kept = BadLines("skip", max_bad_fraction=0.25)
    assert len(read_conversations(path, bad_lines=kept)) == 3 and len(kept) == 1 and kept.lines == 4


def test_damage_in_the_last_line_without_newline(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\r\n" + b'{"prompt": "a"')
    with pytest.raises(DataError, match=r"x.jsonl:2: not valid JSON"):
        read_conversations(path)


def test_a_line_ends_at_newline_only(tmp_path):
    """U+2028 and \\r inside a line are text; str.splitlines would cut there and shift every line number after it."""
    line = json.dumps({"prompt": "a\u2028b\u0085c", "response": "d"}, ensure_ascii=False).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\n" + b"oops\n")
    first, second = iter_lines(path)
    assert first.messages[0].content == "a\u2028b\u0085c" and second.source == f"{path}:2"


def test_the_first_of_several_leads_and_the_others_follow(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, b"bad", GOOD, b"worse"])
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:2: ") and second.startswith(f"  also {path}:4: ")


def test_the_scan_stops_at_20_errors(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [b"bad"] * 5000)
    bad = BadLines()
    with pytest.raises(DataError):
        read_conversations(path, bad_lines=bad)
    assert len(bad) == 20 and bad.lines == 20


def test_the_ceiling_of_skip(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD] * 97 + [b"bad"] * 3)
    assert len(read_conversations(path, bad_lines=BadLines("skip", 0.03))) == 97
    with pytest.raises(DataError, match=r"x.jsonl:98: 3 of 100 lines are bad, expected at most the share 0.02.*max_bad_fraction"):
        read_conversations(path, bad_lines=BadLines("skip", 0.02))


@pytest.mark.parametrize("lines", [[], [b"bad"]])
def test_nothing_to_train_on_is_an_error(tmp_path, lines):
    path = write_jsonl(tmp_path / "x.jsonl", lines)
    with pytest.raises(DataError, match="x.jsonl: got no usable line"):
        read_conversations(path, bad_lines=BadLines("skip", 1.0))


def test_a_missing_file_and_a_directory(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot read the data"):
            read_conversations(path)


def test_wrong_settings_are_not_data_errors(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD])
    for call in (lambda: read_conversations(path, train_on="first"), lambda: BadLines("ignore"), lambda: BadLines("skip", float("nan"))):
        with pytest.raises(ValueError, match="got .*expected") as caught:
            call()
        assert not isinstance(caught.value, DataError)
