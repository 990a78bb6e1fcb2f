"""Configurations that cannot run: exit code 2, every mistake named with its place and the way out, before anything heavy is imported."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.faults.promises import Case

PROMISE = "30 bad configurations: exit code 2, every mistake in one message with its place, less than 2 s of CPU, without torch"
ROOT = Path(__file__).parent.parent.parent
HEAVY = {"torch", "numpy", "transformers", "megatron.core", "vllm", "matplotlib"}
MODEL = "model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4}\n"
ROLLOUT = MODEL + "loss: {name: grpo}\nrollout: {prompts: 24, n: 8, max_tokens: 64}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))

BAD: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "unknown key": (MODEL + "train: {stpes: 3}\n", (), ("x.yaml:2: train.stpes: got an unknown key; did you mean 'train.steps'?",)),
    "unknown section": (MODEL + "trian: {steps: 3}\n", (), ("x.yaml:2: trian: got an unknown key",)),
    "three unknown keys": (
        MODEL + "train: {stpes: 3, lrr: 1}\nseeed: 1\n", (), ("did you mean 'train.steps'", "did you mean 'train.lr'", "did you mean 'seed'")
    ),
    "Megatron's names": (MODEL, ("model.tensor_model_parallel_size=2", "train.micro_batch_size=1"), ("use 'parallel.tensor'", "use 'train.micro_batch'")),
    "field that cannot be set": (MODEL, ("model.calculate_per_token_loss=false",), ("model.calculate_per_token_loss: got a field that cannot be set",)),
    "text for a number": (MODEL + "train: {steps: many}\n", (), ("x.yaml:2: train.steps: got 'many', expected a whole number",)),
    "three wrong types": (
        MODEL + "train: {steps: 4.5, lr: true}\ndata: {packing: 3.5}\n", (),
        ("train.steps: got 4.5", "train.lr: got True, expected a number", "data.packing: got 3.5, expected true or false"),
    ),
    "wrong type, unknown key and impossible value": (
        MODEL + "train: {steps: x, micro_batch: -1, stpe: 1}\nmu: {peak: 2}\n", ("parallel.tensor=0",),
        ("train.steps: got 'x'", "train.stpe: got an unknown key", "train.micro_batch: got -1", "mu.peak: got 2", "parallel.tensor: got 0"),
    ),
    "no such choice": (MODEL + "train: {dtype: fp16}\n", (), ("got 'fp16', expected one of fp32, bf16",)),
    "section as a value": (MODEL + "train: 3\n", (), ("x.yaml:2: train: got 3, expected keys below it",)),
    "nothing about the model": ("seed: 1\n", (), ("model.num_layers: got nothing", "model.hidden_size: got nothing", "model.num_attention_heads: got nothing")),
    "empty file": ("", (), ("model.num_layers: got nothing", "model.hidden_size: got nothing", "model.num_attention_heads: got nothing")),
    "list": ("- a\n- b\n", (), ("got a YAML list",)),
    "no YAML": ("train: {steps: 3\n", (), ("x.yaml:2: got text that is no YAML",)),
    "key twice": (MODEL + "seed: 1\nseed: 2\n", (), ("x.yaml:3: got text that is no YAML (found duplicate key",)),
    "Python tag": (MODEL + "seed: !!python/object/apply:os.getpid []\n", (), ("x.yaml:2: got text that is no YAML (could not determine a constructor",)),
    "function of OmegaConf": (MODEL + "run_dir: ${oc.env:HOME}\n", (), ("x.yaml:2: run_dir: got '${oc.env:HOME}', expected a plain value or another key",)),
    "reference to nothing": (MODEL + "train: {steps: '${train.stps}'}\n", (), ("'train.stps' not found",)),
    "aliases of aliases": (BOMB, (), ("more than 10000 values",)),
    "an alias of itself": ("a: &a [*a]\n", (), ("more than 10000 values",)),
    "no override": (MODEL, ("train.steps",), ("got the override 'train.steps', expected key=value",)),
    "override with a plus": (MODEL, ("+train.steps=3",), ("key=value without dashes",)),
    "file that is not there": ("", ("seed=1",), ("none.yaml: cannot read the configuration: got No such file",)),
    "numbers that are none": (MODEL, ("train.lr=.nan", "loss.beta=.inf", "train.clip_grad=-1"),
                              ("train.lr: got nan", "loss.beta: got inf, expected a finite number", "train.clip_grad: got -1")),
    "two sizes that fit nothing": (
        MODEL, ("parallel.tensor=3", "train.global_batch=7"), 
        ("model.num_attention_heads: got 4, expected a multiple of 3", "model.ffn_hidden_size: got 256", "train.global_batch: got 7", "world size: got 1 rank")
    ),
    "impossible layout": (MODEL, ("parallel.pipeline=3", "parallel.sequence=true"), ("model.num_layers: got 4, expected a multiple of 3", "parallel.sequence: got true", "world size: got 1")),
    "too few ranks": (MODEL, ("parallel.tensor=2",), ("world size: got 1 rank, expected a multiple of 2",)),
    "warm-up longer than the run": (MODEL, ("train.warmup_steps=300", "train.min_lr=1"), ("train.warmup_steps: got 300", "train.min_lr: got 1.0")),
    "server with a password": (
        ROLLOUT, ("rollout.engine=server", "rollout.url=http://me:hunter2@a:1", "rollout.top_p=0.9"),
        ("rollout.url: got an address with a user or password", "rollout.top_p: got a cut support"),
    ),
    "rollouts that fit nothing": (
        ROLLOUT, ("rollout.n=1", "rollout.updates=5", "rollout.max_tokens=512"), ("rollout.n: got 1", "rollout.prompts: got 24", "rollout.max_tokens: got 512")
    ),
}  # fmt: skip
QUICK = ("wrong type, unknown key and impossible value", "aliases of aliases", "two sizes that fit nothing", "server with a password", "Python tag")


def refused(name: str, folder: Path) -> None:
    """The real command."""
    text, overrides, expected = BAD[name]
    path = folder / ("none.yaml" if name == "file that is not there" else "x.yaml")
    if name != "file that is not there":
        path.write_text(text)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-X", "importtime", "-m", "megatron_plugin.cli", "train", str(path), *overrides]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # of CPU: the wall clock of a busy machine says little
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2 and not done.stdout, (done.returncode, said)
    assert len(said) == len(expected) and said[0].startswith("megatron-plugin: error: "), said
    assert all(line.startswith("  also ") for line in said[1:]), said
    for part in expected:
        assert sum(part in line for line in said) == 1, (part, said)
    assert "hunter2" not in done.stderr
    assert not imported & HEAVY, imported & HEAVY
    assert seconds < 2, seconds


def cases(*, full: bool) -> list[Case]:
    return [Case(name, partial(refused, name)) for name in (BAD if full else QUICK)]
