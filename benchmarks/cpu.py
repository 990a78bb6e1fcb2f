"""All CPU rows in under six minutes: `python -m benchmarks.cpu` writes benchmarks/results/<date>-cpu-kernels.{json,md,png}.

Runs the benchmarks one after another on the quiet machine it asks for; a step that overruns is stopped and said to be.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._machine import ROOT

STEPS = {  # seconds each may take; targets first
    "stats_forward": 60, "grad_in_place": 30, "linear_loss": 110, "cpu_memory": 75, "loss_forward_backward": 75, "min_weight": 40, "chunk_size": 40,
}  # fmt: skip
TOTAL = 345
SPARE = 12
"""Seconds a step needs to start and to finish its last shape."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--seconds", default="2.5", help="time spent timing each shape")
    parser.add_argument("--tiny", action="store_true", help="tests this file, measures nothing")
    arguments = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "PYTHONWARNINGS": "ignore"}
    environment.pop("OMP_NUM_THREADS", None)  # all cores
    began, notes = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for name in arguments.steps:
            left = TOTAL - (time.monotonic() - began)
            seconds = min(STEPS[name], left)
            if seconds < SPARE:
                notes += ["--note", f"Step {name}: not run, the time was spent."]
                continue
            part = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", "--device", "cpu", "--seconds", arguments.seconds, "--out", str(part),
                       "--budget", f"{seconds - SPARE:.0f}", *["--tiny"] * arguments.tiny]  # fmt: skip
            try:
                code = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds + 5).returncode
            except subprocess.TimeoutExpired:
                code = "stopped at its time limit"
            if code:
                notes += ["--note", f"Step {name}: exit {code}."]
            parts += [str(part)] * part.exists()
        subprocess.run([sys.executable, "-m", "benchmarks.page", *parts, "--into", str(arguments.into), *notes], cwd=ROOT, env=environment, check=True)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
