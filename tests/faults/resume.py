"""kill -9 of one rank of four at ten points of a run, then the same command again, or torchrun's own restart."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from megatron_plugin.data import generate
from tests.faults.jobs import slower
from tests.faults.promises import Case

ROOT = Path(__file__).parents[2]
PROMISE = ("after kill -9 of a rank the run goes on bit-identically (losses, gradient norms, hashes of weights and optimizer of every rank over the next "
           "20 steps), its first step within 60 s of the restart")  # fmt: skip
STEPS, SAVED = 30, 5
POINTS = ("data", "forward", "backward", "collective", "gradients", "optimizer", "inside optimizer", "schedule", "evaluation", "save")
TIMEOUT_S, RESTART_S = 400, 60
SETTINGS = {  # data parallel 2, with four ranks tensor parallel 2; distributed optimizer, dropout, packing
    "parallel.distributed_optimizer": "true", "model.hidden_dropout": 0.1, "model.attention_dropout": 0.1, "data.packing": "true",
    "train.steps": STEPS, "train.global_batch": 4, "train.micro_batch": 1, "train.eval_interval": SAVED, "checkpoint.interval": SAVED, "checkpoint.keep": 2,
    "data.bpe_vocab_size": 300, "data.seq_length": 96, "data.overlong": "drop", "data.eval_answers": 0, "model.hidden_size": 32, "loss.name": "dft",
}  # fmt: skip


def cases(*, full: bool) -> list[Case]:
    points, ranks = (POINTS, 4) if full else (("inside optimizer",), 2)
    return [Case(f"kill in {point}", partial(killed, point=point, restarts=i % 2 == 0, ranks=ranks)) for i, point in enumerate(points)]


def killed(folder: Path, *, point: str, restarts: bool, ranks: int) -> float:
    """Seconds from the restart to the first step after it."""
    rng = random.Random(f"kill {point}")
    step = 11 if point == "evaluation" else 10 if point == "save" else rng.randrange(6, 10)  # both come between steps, counted as the next one
    plant = {"rank": rng.randrange(ranks), "step": step, "point": point, "once": str(folder / "killed")}
    _data(folder)
    command = _command(folder, ranks, restarts=1 if restarts else 0)
    first = _run(command, folder, plant)
    begin = float((folder / "killed").read_text())  # torchrun's own restart begins with the kill
    if not restarts:
        assert first.returncode != 0, "the job did not notice the kill"
        begin, again = time.time(), _run(command, folder, {})
        assert again.returncode == 0, again.stdout[-3000:]
    else:
        assert first.returncode == 0, first.stdout[-3000:]
    expected, seconds = _lines(undisturbed(ranks), ranks), 0.0
    for rank, lines in _lines(folder, ranks).items():
        resumed = [line for line in lines if line["pid"] == lines[-1]["pid"]]  # not by time: the others may finish a step after the kill
        assert [line["step"] for line in resumed] == list(range(resumed[0]["step"], STEPS + 1)), [line["step"] for line in resumed]
        assert len(resumed) > 19 and resumed[0]["step"] <= step, (rank, resumed[0]["step"])
        for line in lines:
            right = expected[rank][line["step"] - 1]
            assert all(line[name] == right[name] for name in ("step", "loss", "grad_norm", "hash")), (rank, line, right)
        seconds = max(seconds, resumed[0]["at"] - begin)
    assert seconds <= RESTART_S * slower(), f"the first step came {seconds:.0f} s after the restart"
    return seconds


@functools.cache
def undisturbed(ranks: int) -> Path:
    """The folder of the same run without a fault."""
    folder = Path(tempfile.mkdtemp(prefix="undisturbed-"))
    _data(folder)
    done = _run(_command(folder, ranks, restarts=0), folder, {})
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


def _data(folder: Path) -> None:
    for split, count in (("train", 300), ("heldout", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generate(split, count, seed=1)))


def _command(folder: Path, ranks: int, *, restarts: int) -> list[str]:
    settings = SETTINGS | {"run_dir": folder / "run", "data.train": folder / "train.jsonl", "data.eval": folder / "heldout.jsonl", "parallel.tensor": ranks // 2}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    return [*torchrun, str(ROOT / "tests/faults/planted.py"), "train", str(ROOT / "configs/debug_cpu.yaml"), *overrides]


def _run(command: list[str], folder: Path, plant: dict) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RECORD": str(folder), "PLANT": json.dumps(plant), "PYTHONPATH": str(ROOT)}
    said = folder / "said.txt"  # a file: a pipe would be kept open by whatever outlives the job
    with open(said, "w") as output:
        job = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            job.wait(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            raise AssertionError(f"the job did not end within {TIMEOUT_S} s:\n{said.read_text()[-3000:]}") from None
        finally:
            _end_what_is_left(folder)
    return subprocess.CompletedProcess(command, job.returncode, said.read_text())


def _end_what_is_left(folder: Path) -> None:
    """The queue between megatron-core's writers is a process, which a rank that is killed leaves behind."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"RECORD={folder}\0".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def _lines(folder: Path, ranks: int) -> dict[int, list[dict]]:
    """Rank -> its lines in the order they were written."""
    return {rank: [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()] for rank in range(ranks)}
