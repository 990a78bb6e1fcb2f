"""Two ranks that save checkpoints 1, 2, 3, ... of a tiny model whose every weight is the step, and what goes wrong with their files.

    python tests/faults/saving_job.py FOLDER < trials.json       one line of JSON per trial

A trial says after how many operations on files (made, renamed, synced, removed; also by the writer processes) a rank is killed, or from
which one on its disk is full, or at a rename to which name it is killed, with step 2 saved twice.  Counting starts at the second save, so that one checkpoint is always there.  Every trial is two ranks forked
from this process; when one dies the other is killed, as torchrun does.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
RANKS, STEPS, LIMIT_S = 2, 4, 90
WRITES = ("open", "mkdir", "rename", "replace", "fsync", "save")
REMOVALS = ("unlink", "remove", "rmdir")


def main(folder: Path) -> None:
    from megatron_plugin.trainer import checkpoint, model, saving, world  # noqa: F401  imported once, before the ranks are forked

    for i, trial in enumerate(json.load(sys.stdin)):
        place = folder / str(i)
        place.mkdir()
        begin = time.perf_counter()
        codes = _ranks(place, _write, trial)
        seconds = time.perf_counter() - begin
        _ranks(place, _read, trial)
        answer = json.loads((place / "read.json").read_text()) if (place / "read.json").exists() else {}
        done = [json.loads((place / f"done{rank}.json").read_text()) if (place / f"done{rank}.json").exists() else {} for rank in range(RANKS)]
        print(json.dumps({"codes": codes, "seconds": seconds, "ranks": done} | answer), flush=True)


def _ranks(place: Path, act, trial: dict) -> list[int]:
    """Exit codes of the ranks, negative for a signal."""
    store, pids = place / f"{act.__name__}.store", {}
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
                output = open(place / f"out{rank}.txt", "a", buffering=1)
                os.dup2(output.fileno(), 1)  # the writer's helper processes outlive a kill, and would keep our pipe open
                os.dup2(output.fileno(), 2)
                sys.stdout = output
                act(place, trial, rank, store)
                code = 0
            except BaseException as error:
                traceback.print_exc(file=sys.stdout)
                code = getattr(error, "exit_code", 1)
            os._exit(code)
        pids[pid] = rank
    codes, until = {}, time.monotonic() + LIMIT_S
    while len(codes) < RANKS:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
        if any(code != 0 for code in codes.values()) or time.monotonic() > until:
            time.sleep(0.5)  # the others may be about to say the same
            for pid, rank in pids.items():
                if rank not in codes:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
            until = time.monotonic() + LIMIT_S
        time.sleep(0.02)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return [codes[rank] for rank in range(RANKS)]


@contextlib.contextmanager
def _model(store: Path, rank: int):
    import torch.distributed as dist

    from megatron_plugin.config import load_config
    from megatron_plugin.trainer import model
    from megatron_plugin.trainer.world import world

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    tiny = ("model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "parallel.tensor=2")
    config = load_config(str(ROOT / "configs/debug_cpu.yaml"), tiny, world_size=RANKS)
    with world(config):
        transformer = model.transformer_config(config)
        chunks = model.build_model(config, transformer, 64)
        yield chunks, model.build_optimizer(config, transformer, chunks)[0]


def _write(place: Path, trial: dict, rank: int, store: Path) -> None:
    from megatron_plugin.trainer.saving import Saver

    with _model(store, rank) as (chunks, optimizer):
        files = _Files(trial if trial.get("rank") == rank else {})
        saver = Saver(place / "run", keep=2, asynchronous=trial.get("asynchronous", False))
        try:
            for step in (1, 2, 2, 3) if trial.get("again") else range(1, STEPS + 1):
                for chunk in chunks:
                    for weight in chunk.module.parameters():
                        weight.data.fill_(float(step))
                optimizer.reload_model_params()
                files.count(step)
                saver.save({"step": step, "vocab_size": 64, "data": None}, chunks, optimizer)
                for weight in chunks[0].module.parameters():
                    weight.data.fill_(-1.0)  # what an asynchronous save must not see
                until = time.monotonic() + 30
                while saver._writing is not None and time.monotonic() < until:
                    saver.poll()
                    time.sleep(0.01)
                if rank == 0:
                    (place / "saved").write_text(str(saver.saved))
            saver.finish()
        finally:
            files.count(0)
            (place / f"done{rank}.json").write_text(json.dumps({"failed": saver.failed, "operations": files.done.value, "saved": saver.saved}))


def _read(place: Path, trial: dict, rank: int, store: Path) -> None:
    """What a restart finds."""
    import torch

    from megatron_plugin.trainer.checkpoint import load_checkpoint, usable
    from megatron_plugin.trainer.saving import Saver, put_back

    with _model(store, rank) as (chunks, optimizer):
        put_back(place / "run")
        used = usable(place / "run")
        step = load_checkpoint(used, chunks, optimizer, verified=True)["step"]
        right = all(bool(torch.all(weight == step)) for weight in chunks[0].module.parameters())
        Saver(place / "run", keep=2)
        if rank == 0:
            left = sorted(path.name for path in (place / "run/checkpoints").iterdir() if ".writing" in path.name or ".replaced" in path.name)
            saved = int((place / "saved").read_text().replace("None", "0")) if (place / "saved").exists() else 0
            (place / "read.json").write_text(json.dumps({"used": step, "right": right, "left": left, "reported": saved}))


class _Files:
    """Counts the operations on files under checkpoints/ of this process and those it forks, and does what the trial says."""

    def __init__(self, trial: dict):
        context = multiprocessing.get_context("fork")
        self.trial, self.done, self.step, self.main = trial, context.Value("i", 0), context.Value("i", 0), os.getpid()
        for owner, name in ((os, "mkdir"), (os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "remove"), (os, "rmdir")):
            self._wrap(owner, name, name)
        self._wrap(builtins, "open", "open")
        self._wrap(io, "open", "open")
        import torch

        self._wrap(torch, "save", "save")

    def count(self, step: int) -> None:
        """Of the saves from the second on; 0: no more."""
        self.step.value = step

    def _wrap(self, owner: object, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def operation(*arguments, **named):
            if kind == "open" and not set(str(named.get("mode", arguments[1] if len(arguments) > 1 else "r"))) & set("wax+"):
                return original(*arguments, **named)
            if self.step.value < 2 or not _is_ours(arguments, named):
                return original(*arguments, **named)
            with self.done.get_lock():
                self.done.value += 1
                number = self.done.value
            if self.trial.get("fails_in") == self.step.value or self.trial.get("fails_from", STEPS + 1) <= self.step.value:
                if number >= self.trial["operation"] and kind in WRITES:
                    raise OSError(self.trial["errno"], os.strerror(self.trial["errno"]))
            result = original(*arguments, **named)
            if (self.trial.get("kills") and number == self.trial["operation"]) or str(arguments[-1]).endswith(self.trial.get("kills_at", "\0")):
                if kind == "save":  # cut off
                    os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
                os.kill(self.main, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, operation)


def _is_ours(arguments: tuple, named: dict) -> bool:
    for value in (*arguments[:2], *named.values()):
        if isinstance(value, int) and not isinstance(value, bool):
            with contextlib.suppress(OSError):
                value = os.readlink(f"/proc/self/fd/{value}")
        if isinstance(value, (str, Path)) and "/run/checkpoints" in str(value):
            return True
    return False


def run(folder: Path, trials: list[dict]) -> list[dict]:
    """The answers, one per trial."""
    import subprocess

    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, str(folder)], input=json.dumps(trials), env=env, capture_output=True, text=True, timeout=120 + 2 * LIMIT_S * len(trials))
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(trials), f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return answers


def seeded(seed: int, operations: Sequence[int], *, asynchronous: bool) -> dict:
    """Rank and operation of a trial, from how many operations each rank made without a fault."""
    rng = random.Random(f"saving {seed}")
    rank = rng.choices(range(RANKS), weights=operations)[0]
    return {"rank": rank, "operation": rng.randint(1, operations[rank]), "asynchronous": asynchronous}


FULL, BROKEN = errno.ENOSPC, errno.EIO

if __name__ == "__main__":
    main(Path(sys.argv[1]))
