"""The model that every study of columns.py starts from: trained from scratch on the two styles, both operations, never on a letter or a fact.

    python -m benchmarks.dynamics.base --seeds 0 1 2 3 4    # otherwise made by the first study that needs it; kept in runs/dynamics/base
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import torch

from benchmarks._machine import ROOT
from benchmarks.dynamics.columns import BASE, VOCABULARY, draw_problems
from benchmarks.dynamics.learn import Trainer, demonstrations, evaluate
from benchmarks.dynamics.model import Size, TinyLlama
from megatron_plugin import bind

__all__ = ["RUNS", "STEPS", "base", "held_out"]

RUNS = ROOT / "runs" / "dynamics"
STEPS = 450
"""Right about a third of the time when sampled, with both styles."""
BATCH, LR, WARM_UP = 128, 1.5e-3, 50
HELD_OUT = 200


def held_out(operation: str, count: int = HELD_OUT):
    """The problems that every model is measured on, the same for all seeds."""
    return draw_problems(count, operation, random.Random(f"held out {operation}"), held_out=True)


def base(seed: int, steps: int = STEPS, *, runs: Path = RUNS, size: Size | None = None) -> TinyLlama:
    """The model of that seed, trained now unless it is there."""
    path = runs / "base" / f"seed{seed}-{steps}.pt"
    model = TinyLlama(size or Size(VOCABULARY))
    if not path.exists():
        _train(seed, steps, path, model.size)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _train(seed: int, steps: int, path: Path, size: Size) -> None:
    torch.manual_seed(seed)
    model, rng, sft, began = TinyLlama(size), random.Random(f"base {seed}"), bind("sft"), time.process_time()
    trainer = Trainer(model, LR)
    for step in range(1, steps + 1):
        demos = [(problem, problem.solved(BASE, rng)) for problem in draw_problems(BATCH, "+-", rng)]
        trainer.step([demonstrations(demos)], sft, lr_factor=min(1.0, step / WARM_UP))
    keep(model, path)
    plus, minus = (evaluate(model, held_out(operation), seed=0).right for operation in "+-")
    print(f"base, seed {seed}: {plus:.3f} of + and {minus:.3f} of - right, sampled; {time.process_time() - began:.0f} s", flush=True)


def keep(model: TinyLlama, path: Path) -> None:
    """Save it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(model.state_dict(), temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    torch.set_num_threads(1)
    for seed in parser.parse_args().seeds:
        base(seed)


if __name__ == "__main__":
    main()
