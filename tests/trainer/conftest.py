"""A few of the embedded problems as files: reading all 8000 would be most of a test's time."""

import json

import pytest

from megatron_plugin.data import generate


@pytest.fixture(scope="session")
def problems(tmp_path_factory) -> dict[str, str]:
    """Overrides that train on 400 problems and evaluate on 8 held-out ones."""
    folder = tmp_path_factory.mktemp("problems")
    for split, count in (("train", 400), ("heldout", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generate(split, count, seed=1)))
    return {"data.train": str(folder / "train.jsonl"), "data.eval": str(folder / "heldout.jsonl"), "data.overlong": "drop"}
