import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from megatron_plugin.data import train_tokenizer
from tests.data.samples import TEXTS


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tok") / "tokenizer"
    train_tokenizer(TEXTS, directory, vocab_size=300)
    return directory


@pytest.fixture
def tokenizer(tokenizer_directory):
    """A fresh copy each time: tests change its chat template."""
    from megatron_plugin.data import load_tokenizer

    return load_tokenizer(tokenizer_directory)
