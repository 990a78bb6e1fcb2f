"""`make demo-onpolicy`: one warm start by SFT, then GRPO, CHORD-mu, CHORD-phi, SFT, and SFT before GRPO, from that checkpoint, with a live vLLM.

    python examples/demo_onpolicy.py [RUN_DIR] [--seeds 3] [--arms grpo,chord_mu]        # default runs/demo-onpolicy; finished parts are not repeated

Each part is the command a person would type: `megatron-plugin serve` for one vLLM server, and torchrun ... train configs/<arm>.yaml on two
tensor-parallel CPU ranks (or GPUs), which sends the server its weights after every step.

The warm model is hasty: half of the worked answers it learnt stop too early and are wrong.  The reward, a right number after "####", teaches it to
finish.  Experts finish, but stray in style: 30 % of their lines begin with a meaningless word.  Held-out problems are made before training and are in
none of the other sets.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_plugin.data import generate
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.report.plots import plot_curves

ROOT = Path(__file__).parent.parent
WARM_STEPS, STEPS, SFT_STEPS = 350, 30, 10
HELD_OUT, EVAL_N = 200, 4
ARMS = ("grpo", "chord_mu", "chord_phi", "sft", "sft_then_grpo")
CHORD_MU = ("loss.name=chord", "loss.preset=mu", "mu.warmup_steps=0", "mu.decay_steps=20", "mu.peak=0.5", "mu.valley=0.02")
CHORD_PHI = ("loss.name=chord", "loss.preset=phi", "mu.peak=0.1", "mu.valley=0.1")
SFT_ONLY = ("loss.name=chord", "loss.preset=mu", "mu.peak=1.0", "mu.valley=1.0")  # mu = 1: no rollouts, the same loop and evaluation
REWARDS = ("eval/heldout_reward_greedy", "eval/heldout_reward_sampled", "eval/ood_reward_greedy", "eval/ood_reward_sampled")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def run(words: list[str]) -> None:
    print("\n$ " + " ".join(["python", *words[1:]]), flush=True)
    subprocess.run(words, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)


def train(config: str, run_dir: Path, steps: int, *overrides: str) -> list[dict[str, float]]:
    """Train, and return the lines of metrics.jsonl."""
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    run(command("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "megatron_plugin.cli", "train", config,
                f"run_dir={run_dir}", f"parallel.tensor={ranks}", f"train.steps={steps}", "checkpoint.interval=0", *overrides))  # fmt: skip
    return read_metrics(run_dir)


def write_data(folder: Path, seed: int) -> dict[str, Path]:
    """Every set, before anything is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "warm": generate("warm", 3000, seed, largest=10, hasty=0.5), "expert": generate("expert", 1000, seed, largest=10, filler=0.3),
        "prompts": generate("prompts", 2000, seed, largest=10), "heldout": generate("heldout", HELD_OUT, seed + 1, largest=10),
        "ood": generate("ood", HELD_OUT, seed + 1, largest=10),
    }  # fmt: skip
    for name, lines in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: folder / f"{name}.jsonl" for name in made}


class Server:
    """`megatron-plugin serve` on a free port, while inside."""

    def __init__(self, model_dir: Path, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        words = command("megatron_plugin.cli", "serve", str(model_dir), f"--port={port}", "--dtype=fp32", "--max-model-len=128")
        print("\n$ " + " ".join(["python", *words[1:]]), flush=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(words, stdout=output, stderr=output, cwd=ROOT, start_new_session=True)

    def __enter__(self) -> str:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return self.url
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise SystemExit(f"the vLLM server did not come up: see {self.url} and its log") from None
                time.sleep(0.5)

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def study(run_dir: Path, seed: int, arms: list[str]) -> dict[str, list[dict[str, float]]]:
    """{arm: lines of metrics.jsonl}, all from one warm checkpoint."""
    data, warm, hf = write_data(run_dir / "data", seed), run_dir / "warm", run_dir / "hf"
    sets = [f"data.eval=[{data['heldout']},{data['ood']}]", "data.eval_answers=0", f"seed={seed}"]
    train("configs/sft.yaml", warm, WARM_STEPS, "train.lr=3.0e-3", "train.micro_batch=16", "train.log_interval=50", f"data.train={data['warm']}", *sets)
    if not hf.exists():
        run(command("megatron_plugin.cli", "export", str(warm), str(hf)))
    with Server(hf, run_dir / "server.log") as url:
        common = [*sets, f"data.train={data['expert']}", f"data.prompts={data['prompts']}", f"checkpoint.init={warm}", "rollout.engine=server",
                  f"rollout.url={url}"]  # fmt: skip
        ways = {"grpo": ("loss.name=grpo",), "chord_mu": CHORD_MU, "chord_phi": CHORD_PHI, "sft": SFT_ONLY}
        results = {}
        for arm in arms:
            if arm == "sft_then_grpo":
                train("configs/chord.yaml", run_dir / "sft_first", SFT_STEPS, *common, *SFT_ONLY, f"train.eval_interval={SFT_STEPS}")
                results[arm] = train("configs/grpo.yaml", run_dir / arm, STEPS, *common, f"checkpoint.init={run_dir / 'sft_first'}")
            else:
                results[arm] = train(f"configs/{'grpo' if arm == 'grpo' else 'chord'}.yaml", run_dir / arm, STEPS, *common, *ways[arm])
    plot_curves({arm: run_dir / arm for arm in arms}, run_dir / "curves.png", title=f"from one warm start, seed {seed}")
    return results


def spread(values: list[float], samples: int) -> tuple[float, float]:
    """(mean, standard error): over seeds where there are several, else binomial over the held-out questions."""
    mean = statistics.mean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.sqrt(mean * (1 - mean) / samples)


def evaluated(lines: list[dict[str, float]], name: str) -> list[float]:
    """The values of an evaluation in the order of steps."""
    return [line[name] for line in lines if line.get(name) is not None]


def rise(first: list[float], last: list[float]) -> str:
    """last - first over seeds, each seed with itself: it rises where that exceeds three standard errors."""
    mean, error = spread([b - a for a, b in zip(first, last, strict=True)], HELD_OUT)
    return f"{mean:+.3f} ± {error:.3f} {'rises' if mean > 3 * error else 'no rise'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", nargs="?", default="runs/demo-onpolicy", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", default=",".join(ARMS))
    arguments = parser.parse_args()
    root, arms = arguments.run_dir.absolute(), arguments.arms.split(",")
    found = [study(root / f"seed{seed}" if arguments.seeds > 1 else root, 1234 + seed, arms) for seed in range(arguments.seeds)]
    table = Table(title=f"reward on held-out problems, {arguments.seeds} seed(s): mean and standard error, at the start and after {STEPS} steps")
    for heading in ("", *(name.removeprefix("eval/").replace("_reward_", ", ") for name in REWARDS)):
        table.add_column(heading, justify="right" if heading else "left")
    for arm in arms:
        ends = [[[evaluated(results[arm], name)[place] for results in found] for name in REWARDS] for place in (0, -1)]
        for label, values in zip((f"{arm}, start", arm), ends, strict=True):
            table.add_row(label, *("{:.3f} ± {:.3f}".format(*spread(over_seeds, HELD_OUT)) for over_seeds in values))
        if arguments.seeds > 2:
            table.add_row(f"{arm}, change", *map(rise, *ends))
    Console(width=140).print(table)
    print(f"curves: {root}{'/seed*' if arguments.seeds > 1 else ''}/curves.png   each run: metrics.jsonl rollouts.jsonl in its own directory")


if __name__ == "__main__":
    main()
