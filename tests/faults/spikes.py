"""Loss spikes: a sound run has none, and every planted one is found."""

import random
from pathlib import Path

from tests.faults.alone import alone
from tests.faults.problems import small_run
from tests.faults.promises import Case

PROMISE = "a loss above 10 times the median of the last 100 is marked, with its samples: 0 of 1,000 sound steps, 20 of 20 planted ones; skipped if so configured"
SCALE = 1000.0
"""Factor of the logits in a planted step: of a model that has learnt something, the NLL is then far above ten times the median."""


def cases(*, full: bool) -> list[Case]:
    if not full:
        return [Case("3 planted", lambda folder: _try(folder, steps=44, planted=3), tries=3)]
    return [Case("1000 sound steps", lambda folder: _try(folder, steps=1000, planted=0), tries=1000),
            Case("20 planted", lambda folder: _try(folder, steps=1000, planted=20), tries=20)]  # fmt: skip


def _try(folder: Path, *, steps: int, planted: int) -> None:
    chosen = sorted(random.Random(f"spikes {steps}").sample(range(25, steps), planted))
    overrides = small_run(folder, **{
        "train.steps": str(steps), "train.micro_batch": "2", "train.global_batch": "2", "train.lr": "3e-3", "model.num_layers": "1", "model.hidden_size": "32",
        "train.skip_spikes": "true", "train.log_interval": "1000"})  # fmt: skip
    found = alone("tests.faults.guard_ranks", "train", timeout_s=1200, overrides=overrides, faults=dict.fromkeys(chosen, (0, SCALE)))
    assert found["error"] is None, found["error"]
    lines = found["lines"]
    assert len(lines) == steps and [line["step"] for line in lines if line["train/spike"]] == chosen
    assert [step for step, same in found["unchanged"].items() if same] == chosen, "train.skip_spikes: those, and no other, were not applied"
    assert lines[-1]["guard/skipped_steps"] == planted
    said = [line for line in found["said"].splitlines() if "train.spike_factor" in line]
    assert len(said) == planted and all("train.jsonl:" in line and line.startswith(f"step {step}: ") for step, line in zip(chosen, said, strict=True))
