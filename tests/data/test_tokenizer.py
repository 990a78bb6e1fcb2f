"""The BPE trained on the spot: same text, same bytes; loadable as any Hugging Face tokenizer; and what load_tokenizer refuses."""

import json
import os
import subprocess
import sys

import pytest

from megatron_plugin.data import DataError, load_tokenizer, pad_id, train_tokenizer, true_vocab_size
from megatron_plugin.data.tokenizer import _train_bpe, special_ids
from tests.data.samples import TEXTS


def test_any_text_survives(tokenizer):
    for text in ["#### 72\n", "  two  spaces ", "\n\n", "caf\u00e9 \U0001f389 \u6f22\u5b57 \x00\x7f", "a\u2028b", " ,.!'s"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_digit_is_a_token(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer("1020+3")["input_ids"]] == list("1020+3")


def test_the_true_vocabulary(tokenizer):
    assert true_vocab_size(tokenizer) == max(tokenizer.get_vocab().values()) + 1 == 300
    ids = [i for text in TEXTS for i in tokenizer(text)["input_ids"]]
    assert max(ids) < true_vocab_size(tokenizer)
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    assert true_vocab_size(tokenizer) == 301


def test_a_small_text_gives_a_smaller_vocabulary_than_asked(tmp_path):
    assert true_vocab_size(train_tokenizer(["abab abab"] * 2, tmp_path / "t", vocab_size=10_000)) < 300


def test_special_ids(tokenizer):
    assert {"<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"} <= set(
        tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    )
    assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "a"}])["input_ids"], skip_special_tokens=True) == "a"
    assert pad_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id


def test_the_same_text_gives_the_same_bytes(tokenizer_directory, tmp_path):
    train_tokenizer(TEXTS, tmp_path / "again", vocab_size=300)
    names = sorted(p.name for p in tokenizer_directory.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir()) and "tokenizer.json" in names
    for name in names:
        assert (tokenizer_directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_same_text_gives_the_same_merges_in_another_process():
    """Other hash seed, other number of threads: neither may show."""
    code = "import sys, json; from megatron_plugin.data.tokenizer import _train_bpe; print(_train_bpe(json.load(sys.stdin), 300).to_str())"
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(TEXTS), capture_output=True, text=True, env=env, check=True, timeout=120
    )
    assert done.stdout.strip() == _train_bpe(TEXTS, 300).to_str()


def test_training_replaces_the_directory_at_once(tmp_path):
    target = tmp_path / "run" / "tokenizer"
    train_tokenizer(["aaa bbb"], target)
    (target / "stale").write_text("x")
    train_tokenizer(["ccc ddd"], target)
    assert not (target / "stale").exists() and [p.name for p in target.parent.iterdir()] == ["tokenizer"]


def test_the_saved_class_is_known_to_old_and_new_transformers(tokenizer_directory):
    assert json.loads((tokenizer_directory / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_vocabulary_too_small_for_the_bytes():
    with pytest.raises(ValueError, match="vocab_size: got 256, expected at least 263"):
        train_tokenizer(["a"], "unused", vocab_size=256)


def test_missing_directories(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        DataError, match="none: no tokenizer .got nothing there, expected a Hugging Face tokenizer directory.*data.tokenizer"
    ):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match="got a file"):
        load_tokenizer(tmp_path / "file")
    with pytest.raises(DataError, match="empty: cannot load a tokenizer .got no files, expected tokenizer.json"):
        load_tokenizer(tmp_path / "empty")


def test_a_damaged_tokenizer(tokenizer_directory, tmp_path):
    for file in tokenizer_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 2000 if file.name == "tokenizer.json" else None])
    with pytest.raises(DataError, match="cannot load a tokenizer .got .*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_code_in_the_directory_is_not_run(tokenizer_directory, tmp_path):
    """A tokenizer that asks for its own class by auto_map: trust_remote_code stays off."""
    for file in tokenizer_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    try:
        load_tokenizer(tmp_path)
    except DataError:
        pass
    assert not canary.exists()
