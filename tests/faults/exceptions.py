"""One rank raises, in each subsystem in turn; and a trainer that is killed takes everything it started with it."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

from tests.faults.jobs import Job, slower
from tests.faults.preemption import policy_run
from tests.faults.problems import small_run
from tests.faults.promises import Case

PROMISE = ("an exception on any rank, in any subsystem, ends the whole job within 60 s with exit code 1, the first traceback and its rank last; also kill -9 of a "
           "rank or of torchrun: no process of the job outlives it by 10 s")  # fmt: skip
WITHIN_S = 60
SUBSYSTEMS = {  # name -> (place, step, rank)
    "reading": ("reading", 0, 1), "data": ("data", 3, 1), "model": ("forward", 3, 1), "loss": ("loss", 3, 0), "backward": ("backward", 3, 1),
    "gradients": ("gradients", 3, 1), "optimizer": ("inside optimizer", 3, 1), "collective": ("collective", 3, 0), "checkpoint": ("save", 4, 1),
    "evaluation": ("evaluation", 5, 1),
}  # fmt: skip
ROLLOUTS = {"rollout": "generation", "reward": "judging", "weights on their way": "sync"}


def cases(*, full: bool) -> list[Case]:
    chosen = SUBSYSTEMS if full else {"optimizer": SUBSYSTEMS["optimizer"]}
    made = [Case(name, partial(_raises, name=name)) for name in chosen]
    if full:
        made += [Case(name, partial(_raises_on_policy, point=point)) for name, point in ROLLOUTS.items()]
        made += [Case(f"kill -9 of {whom}, vLLM and verifiers alive", partial(_killed, whom=whom)) for whom in ("a rank", "torchrun")]
    return made


def _raises(folder: Path, *, name: str) -> float:
    point, step, rank = SUBSYSTEMS[name]
    overrides = small_run(folder, **{"train.steps": "400", "checkpoint.interval": "3", "train.eval_interval": "4", "train.global_batch": "4",
                                     "parallel.tensor": "2"})  # fmt: skip
    return _ends(Job(folder, 2, {"rank": rank, "step": step, "point": point, "do": "raise"}, overrides), folder, point, rank)


def _raises_on_policy(folder: Path, *, point: str) -> float:
    return _ends(Job(folder, 2, {"rank": 0, "step": 2, "point": point, "do": "raise"}, policy_run(folder), config="configs/chord.yaml"), folder, point, 0)


def _ends(job: Job, folder: Path, point: str, rank: int) -> float:
    """Seconds from the exception to the end of the job."""
    with job:
        job.until(lambda: job.waits.exists() or job.process.poll() is not None, 400)
        assert job.waits.exists(), job.output[-3000:]
        job.wait(120)
        seconds = time.time() - float(job.waits.read_text())
        output = job.output
        assert job.process.returncode == 1, output[-2000:]
        assert f"rank {rank}: Traceback" in output, output[-3000:]
        last = output.rindex("Traceback (most recent call last):")
        assert f"PlantedError: planted in {point}" in output[output.index("Root Cause (first observed failure)") :], "torchrun prints it last"
        assert output.count("PlantedError: planted in") <= 3 and "PlantedError" in output[output.index(f"rank {rank}: Traceback") : last + 5000]
        job.nothing_is_left()
    assert seconds <= WITHIN_S * slower(), f"took {seconds:.0f} s"
    return seconds


def _killed(folder: Path, *, whom: str) -> float:
    """Seconds until nothing was left."""
    plant = {"rank": 0, "step": 2, "point": "judging", "do": "wait"}
    overrides = policy_run(folder) | {"rollout.reward": "math"}  # numeric ones need no verifiers
    with Job(folder, 2, plant, overrides, config="configs/chord.yaml") as job:
        job.until_it_waits(400)
        before = job.left()
        assert any("vllm" in command for command in before.values()) and any("reward_worker" in command for command in before.values()), before
        ranks = [pid for pid, command in before.items() if "interrupted.py" in command and "torch.distributed.run" not in command]
        begin = time.monotonic()
        os.kill(job.process.pid if whom == "torchrun" else min(ranks), signal.SIGKILL)
        if whom == "a rank":
            job.wait(120)
        job.nothing_is_left(30 * slower())
        return time.monotonic() - begin
