"""Run directories as the trainer leaves them, without training."""

import json
from pathlib import Path

from megatron_plugin.losses.probability import PROBABILITY_METRICS
from megatron_plugin.rollout.log import RolloutLine, RolloutLog

HOSTILE = "<script>document.title='taken'</script> ![x](http://example.com/x.png) ``` [a](javascript:alert(1)) | # *b* \ud83d"
"""What a model could have written to take over the page it is shown on; ends in half a surrogate pair."""


def metrics_file(run_dir: Path, steps: int, **more: float) -> None:
    """A loss that falls from 4, probabilities that all rise from the lowest tenth to the highest."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            share = 1 - step / steps
            line = {"step": step, "train/loss": 4 * share, "train/nll": 4 * share, "perf/step_s": 0.5, "perf/train_s": 0.4, "data/bad_lines": 0.0}
            line |= {f"train/{name}": share for name in PROBABILITY_METRICS} | more
            file.write(json.dumps(line) + "\n")


def rollouts_file(run_dir: Path, rewards: dict[str, list[float]], *, step: int, completion: str = "2+2=4") -> None:
    """One sample of each reward; {prompt: rewards}."""
    log = RolloutLog(run_dir / "rollouts.jsonl", resumed_at=step - 1)
    log.add(
        RolloutLine(
            step=step, source=f"prompts.jsonl:{number}", prompt=prompt, completion=f"{completion} ({reward})", tokens=5, reward=reward, cause="judged",
            advantage=0.0, finish_reason="stop", weight_version=step,
        )
        for number, (prompt, values) in enumerate(rewards.items())
        for reward in values
    )  # fmt: skip
    log.close()
