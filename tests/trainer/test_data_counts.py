"""Whatever the data loses on the way to the rows is a number of every step."""

import json

from megatron_plugin.report.lines import read_metrics
from tests.spawn import on_ranks

GOOD = {"prompt": "1 + 1 =", "response": "2"}
LONG = {"prompt": "1 + 1 =", "response": "2 " * 300}


def _jsonl(path, *lines) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def _counts(run_dir, **overrides) -> dict[str, float]:
    steps = {"train.steps": 1, "train.warmup_steps": 0, "train.eval_interval": 0, "train.global_batch": 2, "train.micro_batch": 2, "data.packing": "false", "data.seq_length": 64,
             "data.bpe_vocab_size": 280, "run_dir": run_dir, "data.eval_answers": 0}  # fmt: skip
    on_ranks(1, "tests.trainer.ranks", "train", overrides=steps | overrides)
    return {name: value for name, value in read_metrics(run_dir)[0].items() if name.startswith("data/")}


def test_what_the_data_lost_is_in_the_metrics(tmp_path):
    train = _jsonl(tmp_path / "train.jsonl", *[GOOD] * 9, "{", "", LONG, LONG, LONG)
    heldout = _jsonl(tmp_path / "heldout.jsonl", GOOD, LONG)
    given = {"data.train": train, "data.eval": heldout, "data.on_bad_line": "skip", "data.max_bad_fraction": 0.5}
    none = {"data/bad_lines": 2, "data/truncated": 0, "data/dropped": 0, "data/heldout_truncated": 0, "data/heldout_dropped": 0}
    assert _counts(tmp_path / "drop", **given, **{"data.overlong": "drop"}) == none | {"data/dropped": 3, "data/heldout_dropped": 1}
    assert _counts(tmp_path / "cut", **given, **{"data.overlong": "truncate"}) == none | {"data/truncated": 3, "data/heldout_truncated": 1}
    assert _counts(tmp_path / "error", **given) == none | {"data/bad_lines": 5, "data/heldout_dropped": 1}
