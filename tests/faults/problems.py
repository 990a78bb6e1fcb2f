"""Training data of a few hundred lines, and the overrides of a run of seconds."""

import json
from pathlib import Path

from megatron_plugin.data import generate


def small_run(folder: Path, **overrides) -> dict[str, str]:
    """Overrides of configs/debug_cpu.yaml: 400 problems, 8 held-out ones, no checkpoint but the last, everything below `folder`."""
    for split, count in (("train", 400), ("heldout", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generate(split, count, seed=1)))
    return {
        "run_dir": str(folder / "run"), "data.train": str(folder / "train.jsonl"), "data.eval": str(folder / "heldout.jsonl"), "data.overlong": "drop",
        "data.eval_answers": "0", "train.eval_interval": "0", "checkpoint.interval": "0", "train.warmup_steps": "0", "train.lr": "1e-3", "loss.name": "sft",
    } | overrides  # fmt: skip
