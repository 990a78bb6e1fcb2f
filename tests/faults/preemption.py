"""SIGTERM and Ctrl-C at chosen moments: the last completed step is saved, the job ends, and the next start goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from megatron_plugin.data import generate
from megatron_plugin.report.lines import read_metrics
from tests.faults.jobs import Job, slower
from tests.faults.problems import small_run
from tests.faults.promises import Case

PROMISE = "SIGTERM or Ctrl-C: a checkpoint of the last completed step and the end of the job, nothing of it left, within 25 s, also in a save, an evaluation, a rollout"
WITHIN_S = 25
STEPS = 400  # more than can be done meanwhile
MOMENTS = {  # name -> (place that waits, its step, ranks, signal)
    "forward": ("forward", 4, 2, signal.SIGTERM),
    "optimizer": ("inside optimizer", 4, 2, signal.SIGTERM),
    "save": ("save", 4, 2, signal.SIGTERM),
    "evaluation": ("evaluation", 6, 2, signal.SIGTERM),
    "Ctrl-C": ("forward", 4, 2, signal.SIGINT),
    "alone": ("forward", 4, 0, signal.SIGTERM),
    "alone, Ctrl-C": ("forward", 4, 0, signal.SIGINT),
}
UNSAVED = {  # the save before the evaluation that the signal ends has failed on a rank, or is under way in a thread
    "failed save": ({"save_fails": True}, {"checkpoint.interval": "5"}),
    "failed asynchronous save": ({"save_fails": True}, {"checkpoint.interval": "5", "checkpoint.asynchronous": "true"}),
    "asynchronous save": ({}, {"checkpoint.interval": "5", "checkpoint.asynchronous": "true"}),
}
ROLLOUTS = {"generation": "generation", "judging": "judging", "weights on their way": "sync"}


def cases(*, full: bool) -> list[Case]:
    chosen = MOMENTS if full else {"evaluation": MOMENTS["evaluation"]}
    made = [Case(name, partial(_try, moment=moment)) for name, moment in chosen.items()]
    made += [Case(name, partial(_try, moment=MOMENTS["evaluation"], plant=plant, more=more)) for name, (plant, more) in UNSAVED.items() if full]
    return made + [Case(f"rollout, {name}", partial(_rollout, point=point)) for name, point in ROLLOUTS.items() if full]


def _try(folder: Path, *, moment: tuple[str, int, int, int], plant: Mapping[str, object] = MappingProxyType({}), more: Mapping[str, str] = MappingProxyType({})) -> float:
    point, step, ranks, number = moment
    overrides = small_run(folder, **{
        "train.steps": str(STEPS), "checkpoint.interval": "3", "train.eval_interval": "5", "data.eval_samples": "8", "train.global_batch": "4", **more})  # fmt: skip
    job = Job(folder, ranks, {"rank": 0, "step": step, "point": point, "do": "wait", **plant}, overrides | ({"parallel.tensor": "2"} if ranks else {}))
    with job:
        job.until_it_waits()
        seconds = job.send(number)
        code, said = {signal.SIGTERM: (143, "SIGTERM"), signal.SIGINT: (130, "SIGINT")}[number]
        _check(job, folder, said)
        if not ranks:
            assert job.process.returncode == code, f"exit code {job.process.returncode}: {job.output[-2000:]}"
    assert seconds <= WITHIN_S * slower(), f"took {seconds:.0f} s"
    if point == "inside optimizer":  # the step that was under way is complete and saved, and the same command goes on from it
        again = Job(folder, ranks, {"rank": -1}, overrides | {"parallel.tensor": "2", "train.steps": "12", "checkpoint.interval": "0"})
        assert again.wait(240) == 0, again.output[-3000:]
        assert [line["step"] for line in read_metrics(folder / "run")] == list(range(1, 13))
    return seconds


def _check(job: Job, folder: Path, said: str) -> None:
    lines = read_metrics(folder / "run")
    assert lines, job.output[-3000:]
    last = lines[-1]["step"]
    assert f"stopped by {said}: step {last} of " in job.output and "the same command goes on from there" in job.output, job.output[-3000:]
    newest = max(path.name for path in (folder / "run" / "checkpoints").glob("step_????????"))
    assert newest == f"step_{last:08d}", f"saved is {newest}, done were {last} steps"
    assert (folder / "run" / "checkpoints" / newest / "manifest.json").exists()
    job.nothing_is_left()


def _rollout(folder: Path, *, point: str) -> float:
    with Job(folder, 2, {"rank": 0, "step": 3, "point": point, "do": "wait"}, policy_run(folder), config="configs/chord.yaml") as job:
        job.until_it_waits(400)
        seconds = job.send(signal.SIGTERM)
        _check(job, folder, "SIGTERM")
    assert read_metrics(folder / "run")[-1]["step"] == 2, "the third step was given up"
    assert seconds <= WITHIN_S * slower(), f"took {seconds:.0f} s"
    return seconds


def policy_run(folder: Path) -> dict[str, object]:
    """Overrides of configs/chord.yaml: a real vLLM, two tensor-parallel ranks, more steps than can be done meanwhile."""
    for split, count in (("expert", 60), ("prompts", 60), ("heldout", 6)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generate(split, count, 5)))
    return {
        "run_dir": folder / "run", "checkpoint.init": "", "data.train": folder / "expert.jsonl", "data.prompts": folder / "prompts.jsonl",
        "data.eval": folder / "heldout.jsonl", "data.bpe_vocab_size": 320, "data.expert_samples": 4, "rollout.prompts": 4, "rollout.n": 8,
        "rollout.max_tokens": 90, "train.micro_batch": 4, "train.warmup_steps": 0, "train.eval_interval": 0, "model.num_layers": 2, "train.lr": 3e-3,
        "parallel.tensor": 2, "train.steps": STEPS,
    }  # fmt: skip
