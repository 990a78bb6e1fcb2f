"""The numbers that `megatron-plugin doctor --data` gives of a file.  That it finds what training finds: tests/faults/lines.py."""

import json

from megatron_plugin.data import BadLines, ConversationEncoder, DataError, load_rows
from megatron_plugin.data.errors import some_of
from megatron_plugin.data.scan import scan_file
from tests.data.samples import GSM8K, write_jsonl

SYSTEM, USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("system", " "), ("user", "hi"), ("assistant", "ho")))


def test_what_is_in_a_file(tmp_path):
    long = {"prompt": "a", "response": "b" * 500}
    lines = [{"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}, GSM8K[0], long, GSM8K[1], dict(reversed(GSM8K[0].items())), b"{", b"", b"[", GSM8K[0]]
    path = write_jsonl(tmp_path / "x.jsonl", lines)
    scan = scan_file(path)
    assert (scan.lines, scan.good, dict(scan.bad)) == (9, 6, {"not valid JSON": 2, "empty line": 1})
    assert dict(scan.turns) == {"system": 1, "user": 7, "assistant": 7} and scan.trained == 7 and dict(scan.empty) == {"system": 1}
    assert scan.duplicates == 2 and scan.twice == f"{path}:5 repeats line 2", "the order of the keys says nothing"
    assert scan.longest == (501, f"{path}:3") and not scan.tokens
    report = list(scan.report())
    assert report[0] == f"{path}: 9 lines, 6 good, 3 bad, 2 duplicates" and [line for line in report if line.startswith(f"{path}:6: not valid JSON")]
    assert scan_file(path, train_on="last").trained == 6


def test_lengths_in_tokens(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [*GSM8K, {"prompt": "<|eos|>", "response": "a"}])
    encoder = ConversationEncoder(tokenizer)
    lengths = [len(sample.tokens_T) for sample in load_rows(path, tokenizer, 999, bad_lines=BadLines("skip", 1.0)).samples]
    scan = scan_file(path, encoder=encoder)
    assert list(scan.tokens) == lengths and scan.longest_tokens[0] == max(lengths) and scan.good == 3
    (line,) = [line for line in scan.report() if line.startswith("  tokens")]
    assert f"tokens         {sum(lengths)}; a line: median {sorted(lengths)[1]}" in line and line.endswith(f"longest {max(lengths)} ({scan.longest_tokens[1]})")
    cut = scan_file(path, encoder=encoder, seq_length=max(lengths) - 1)
    assert cut.good == 2 and cut.bad["too long"] == 1 and scan_file(path, encoder=encoder, seq_length=max(lengths)).good == 3


def test_bad_lines_are_counted_beyond_those_shown(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [b"{"] * 30 + [json.dumps({"prompt": "a"}).encode()] * 5)
    for shown in (0, 3, 35):
        scan = scan_file(path, shown=shown)
        assert sum(scan.bad.values()) == 35 and len(scan.first) == shown
        assert list(scan.report())[-1].startswith(f"and {35 - shown} more" if shown < 35 else f"{path}:35: missing key")


def test_reasons_are_counted_without_what_is_the_lines_own():
    kinds = {
        "messages[13].role is wrong (got 'a', expected one of user)": "messages[*].role is wrong", "not valid JSON: Extra data at character 5": "not valid JSON",
        "messages[0].content holds the tokenizer's control token '<|x|>' at character 7, expected plain text": "messages[*].content holds the tokenizer's "
        "control token '<|x|>' at character N",
    }  # fmt: skip
    bad = BadLines("skip", 1.0)
    for number, reason in enumerate([*kinds, *kinds]):
        bad.add(DataError(reason, f"f:{number}"))
    assert bad.by_kind() == dict.fromkeys(kinds.values(), 2)
    bad.add(DataError("found wrong by another stage too", "f:0"))
    assert len(bad) == 6, "a line counts once"


def test_long_lists_are_cut():
    assert some_of(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7" and some_of([f"q:{i}" for i in range(5)], 2) == "q:0, q:1 and 3 more" and some_of([]) == ""


def test_a_file_that_cannot_be_read(tmp_path):
    scan = scan_file(tmp_path / "none")
    assert list(scan.report()) == [f"{tmp_path}/none: cannot read the data: No such file or directory; expected a jsonl file"]
