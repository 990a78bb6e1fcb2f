"""From a jsonl file to batches in one call, and one ledger of what was left out on the way."""

import pytest

from megatron_plugin.data import IGNORE_INDEX, BadLines, DataError, RowOrder, load_rows, shard
from tests.data.samples import GSM8K, write_jsonl


def test_gsm8k_lines_to_a_batch(tokenizer, tmp_path):
    rows = load_rows(write_jsonl(tmp_path / "x.jsonl", GSM8K), tokenizer, 160)
    assert len(rows) < len(GSM8K) and rows.report.samples == len(GSM8K), "some must share a row"
    batch = rows.batch(range(len(rows)))
    learnt = {
        tokenizer.decode(batch.labels[i][(batch.labels[i] != IGNORE_INDEX) & (batch.segment_ids[i] == k)])
        for i in range(len(rows))
        for k in range(int(batch.segment_ids[i].max()) + 1)
    }
    assert learnt == {line["answer"] + "<|eos|>" for line in GSM8K}
    assert sorted(s for r in range(len(rows)) for s in rows.sources(r)) == [f"{tmp_path}/x.jsonl:{i}" for i in (1, 2, 3)]


def test_one_ledger_over_all_stages(tokenizer, tmp_path):
    """A cut line, a forged turn and a line too long: three stages, one count, and the ceiling holds for their sum."""
    lines = [*GSM8K, b"{", {"prompt": "<|eos|>", "response": "a"}, {"prompt": "a", "response": "b " * 500}]
    path = write_jsonl(tmp_path / "x.jsonl", lines)
    bad = BadLines("skip", 0.5)
    rows = load_rows(path, tokenizer, 160, bad_lines=bad)
    assert rows.report.samples == 3 and bad.lines == 6 and [e.source for e in bad.errors] == [f"{path}:{i}" for i in (4, 5, 6)]
    with pytest.raises(DataError, match="3 of 6 lines are bad, expected at most the share 0.4"):
        load_rows(path, tokenizer, 160, bad_lines=BadLines("skip", 0.4))
    with pytest.raises(DataError, match=r"x.jsonl:4: not valid JSON"):
        load_rows(path, tokenizer, 160)


def test_train_on_last(tokenizer, tmp_path):
    turns = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second"))
    ]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": turns}])
    for train_on, expected in (("all", "first<|eos|>second<|eos|>"), ("last", "second<|eos|>")):
        batch = load_rows(path, tokenizer, 64, train_on=train_on).batch([0])
        assert tokenizer.decode(batch.labels[batch.labels != IGNORE_INDEX]) == expected


def test_every_rank_makes_the_same_rows(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", GSM8K * 4)
    one, other = (load_rows(path, tokenizer, 160) for _ in range(2))
    assert one.rows == other.rows and one.fingerprint() == other.fingerprint()
    step = RowOrder(len(one), 4, seed=0, fingerprint=one.fingerprint()).next_step()
    halves = [other.batch(micro).tokens for rank in (0, 1) for micro in shard(step, dp_rank=rank, dp_size=2, micro_batch=1)]
    assert [h.tolist() for h in halves] == [[row] for row in one.batch(step).tokens.tolist()]
