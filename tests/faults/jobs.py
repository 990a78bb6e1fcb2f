"""Real jobs, under torchrun or alone, whose processes can all be found again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Job:
    """interrupted.py with a plant.  ranks 0: without torchrun."""

    def __init__(self, folder: Path, ranks: int, plant: Mapping[str, object], overrides: Mapping[str, object], config: str = "configs/debug_cpu.yaml"):
        self.mark, self.waits = uuid.uuid4().hex, folder / "waits"
        starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
        words = [sys.executable, *starter, "tests/faults/interrupted.py", "train", config, *(f"{key}={value}" for key, value in overrides.items())]
        # A rank of a test session would not be alone
        given = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")}
        given |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PLANT": json.dumps({**plant, "mark": str(self.waits)})}
        given["PATH"] = f"{os.environ['PATH']}:/of/{self.mark}"  # every descendant inherits it, verifiers too, which are given little else
        self.log = folder / "output.txt"
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(words, cwd=ROOT, env=given, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        """Nothing of it lives on, whatever the test has found."""
        self.kill()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until_it_waits(self, timeout_s: float = 240) -> None:
        """Returns when the planted place has been reached."""
        self.until(self.waits.exists, timeout_s)

    def until(self, reached, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                output = self.output
                self.kill()
                raise AssertionError(f"never got there, exit code {self.process.returncode}: {output[-3000:]}")
            time.sleep(0.02)

    def send(self, number: int) -> float:
        """The signal to the process that was started, as a scheduler does; seconds until it had ended."""
        begin = time.monotonic()
        os.kill(self.process.pid, number)
        self.wait(120)
        return time.monotonic() - begin

    def wait(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            output = self.output
            self.kill()
            raise AssertionError(f"did not end within {timeout_s} s: {output[-3000:]}") from None

    def left(self) -> dict[int, str]:
        """Process id -> command of every descendant that lives, zombies not counted."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                    if not dead and self.mark.encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
                except OSError:
                    continue  # ended meanwhile
        return found

    def nothing_is_left(self, within_s: float = 10) -> float:
        """Seconds until no descendant was left."""
        begin = time.monotonic()
        while left := self.left():
            if time.monotonic() - begin > within_s:
                self.kill()
                raise AssertionError(f"outlived the job by {within_s} s: {left}")
            time.sleep(0.1)
        return time.monotonic() - begin

    def kill(self) -> None:
        for pid in self.left():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def slower() -> float:
    """How busy the machine is with other things: a limit in seconds is for a quiet one.  Capped: on no machine does a limit mean nothing."""
    return min(4.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))
