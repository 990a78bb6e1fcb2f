"""`make demo`: one warm start by plain SFT, then SFT, DFT and CHORD-phi from that checkpoint on demonstrations of another style, side by side.

    python examples/demo.py [RUN_DIR]            # default runs/demo; finished parts are not repeated

Each part is the command a person would type: torchrun ... -m megatron_plugin.cli train configs/<loss>.yaml, tensor-parallel on two CPU ranks,
or on the machine's GPUs.  The demonstrations answer the same kind of problem but stray: 30 % of the worked lines begin with a meaningless word.
Held-out problems are clean; the out-of-distribution ones are harder.  One seed: a demonstration, not a study.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_plugin.report.lines import read_metrics
from megatron_plugin.report.plots import plot_curves

ROOT = Path(__file__).parent.parent
ARMS = ("sft", "dft", "chord_phi")
WARM_STEPS, STEPS = 350, 100
COLUMNS = {
    "eval/heldout_nll": "NLL", "eval/heldout_accuracy": "accuracy", "eval/ood_nll": "NLL, harder", "eval/ood_accuracy": "accuracy, harder",
    "train/entropy": "entropy", "train/weight_mean": "mean weight",
}  # fmt: skip


def train(loss: str, run_dir: Path, steps: int, *overrides: str) -> dict[str, float]:
    """Train and return the last line of metrics.jsonl."""
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "megatron_plugin.cli", "train",
               f"configs/{loss}.yaml", f"run_dir={run_dir}", f"parallel.tensor={ranks}", f"train.steps={steps}", "train.micro_batch=16",
               "train.log_interval=20", *overrides]  # fmt: skip
    print("\n$ " + " ".join(["python", *command[1:]]), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)
    return read_metrics(run_dir)[-1]


def main(run_dir: Path) -> None:
    warm = run_dir / "warm"
    last = {"warm start": train("sft", warm, WARM_STEPS, "train.lr=3.0e-3", "checkpoint.interval=0")}
    for loss in ARMS:
        last[loss] = train(loss, run_dir / loss, STEPS, "train.lr=5.0e-4", "train.min_lr=5.0e-5", f"checkpoint.init={warm}", "data.filler=0.3", "checkpoint.interval=0",
                           "train.warmup_steps=10", "train.eval_interval=25")  # fmt: skip

    table = Table(title=f"held out, after {WARM_STEPS} steps of SFT and {STEPS} more on straying demonstrations")
    for heading in ("", *COLUMNS.values()):
        table.add_column(heading, justify="right" if heading else "left")
    for name, metrics in last.items():
        table.add_row(name, *(f"{metrics[key]:.3f}" for key in COLUMNS))
    Console(width=120).print(table)
    plot_curves({loss: run_dir / loss for loss in ARMS}, run_dir / "compare.png", title="from one warm start, on straying demonstrations")
    print(f"curves: {run_dir / 'compare.png'}   each run: {run_dir}/<arm>/")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo").absolute())
