"""A run of 2,000 steps: what grows a little in every step grows for days."""

from __future__ import annotations

from pathlib import Path

from tests.faults.alone import alone
from tests.faults.problems import small_run
from tests.faults.promises import Case

PROMISE = "from step 200 to 2,000 of a run with checkpoints and evaluations, resident memory grows by less than 1 % and no file stays open"
FIRST, LAST, LIMIT = 200, 2000, 0.01


def cases(*, full: bool) -> list[Case]:
    return [Case("2000 steps", _try)] if full else []


def _try(folder: Path) -> None:
    overrides = small_run(folder, **{
        "train.steps": str(LAST), "train.micro_batch": "2", "train.global_batch": "2", "model.num_layers": "1", "model.hidden_size": "32",
        "checkpoint.interval": "50", "train.eval_interval": "100", "data.eval_samples": "4", "train.log_interval": "100"})  # fmt: skip
    found = alone("tests.faults.guard_ranks", "memory", timeout_s=1500, overrides=overrides, every=50)
    by_step = {line["step"]: line for line in found}
    print("  ".join(f"{step}: {line['rss'] / 2**20:.1f} MiB, {line['files']} files" for step, line in by_step.items() if step % 200 == 0))
    begin, end = by_step[FIRST], by_step[LAST]
    assert end["rss"] <= begin["rss"] * (1 + LIMIT), f"{begin['rss']} bytes after step {FIRST}, {end['rss']} after step {LAST}"
    assert max(line["files"] for line in found if line["step"] >= FIRST) <= begin["files"], [line["files"] for line in found]
