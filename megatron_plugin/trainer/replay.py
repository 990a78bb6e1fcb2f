"""A step that was not applied because it was not a number, kept so that a person can try it again.

    RUN/replay/step_00000007/step.json             what, where, which samples, and the command that trains on them alone
    RUN/replay/step_00000007/samples.jsonl         those samples: the lines of the data files
    RUN/replay/step_00000007/rank_3.safetensors    the micro-batches in question as that rank had them: tokens, labels, loss_weight, ...
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_plugin.data.errors import some_of
from megatron_plugin.hooks.mcore import groups
from megatron_plugin.trainer.checkpoint import newest
from megatron_plugin.trainer.guard import Guard, Verdict
from megatron_plugin.trainer.manifest import exchange

__all__ = ["describe", "keep"]

MOST = 20
"""Steps kept of one run: a fault that comes and goes for days must not fill the disk."""


def describe(guard: Guard, verdict: Verdict, means: dict[str, float], samples: Sequence[Sequence[str]]) -> tuple[str, list[dict[str, Any]], list[str]]:
    """(one sentence, what every rank found, sources of the samples in question), the same on every rank.  Collective.

    `samples`: of this replica, by micro-batch."""
    found = guard.found()
    located = found["micro_batches"] and max(found["micro_batches"]) < len(samples)
    found["samples"] = [source for i in (found["micro_batches"] if located else range(len(samples))) for source in samples[i]]
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    accused = [x for x in everyone if x["micro_batches"]]
    first = min((x["stage"] for x in accused), default=0)
    accused = [x for x in accused if x["stage"] == first]  # later stages got it from there
    sources = list(dict.fromkeys(source for x in accused or everyone for source in x["samples"]))
    what = f"the loss is {means['lm loss']}" if verdict.loss else f"the gradient norm is {verdict.grad_norm}"
    if not verdict.loss and verdict.grad_norm == verdict.grad_norm and abs(verdict.grad_norm) != float("inf"):
        what = f"a gradient is not finite on {_ranks([x for x in everyone if x['gradient']])}"
    where = f" on {_ranks(accused)}, micro-batch {_numbers(sorted({i for x in accused for i in x['micro_batches']}))} of the step" if accused else ""
    if broken := [x for x in everyone if x["weights"]]:
        where += f"; weights are not finite on {_ranks(broken)}"
    return f"{what}{where}, no weight was changed; the step's samples: {some_of(sources)}", everyone, sources


def keep(guard: Guard, step: int, sentence: str, ranks: list[dict[str, Any]], sources: Sequence[str]) -> Path | None:
    """Write the folder; None where MOST are there already.  Collective; a disk that refuses is no reason to stop."""
    run = guard.run
    run_dir = Path(run.config.run_dir)
    folder = run_dir / "replay" / f"step_{step:08d}"
    own = next(x for x in ranks if x["rank"] == dist.get_rank())
    if not exchange(own["rank"] == 0 and _made(folder))[0]:  # one rank counts and makes: others in the same folder would get in its way
        return None
    try:
        bad = [i for i in own["micro_batches"] if i < len(guard.seen)]
        if bad and groups().tp.rank() == 0:
            save_file({f"{i}.{name}": value.contiguous().cpu() for i in bad for name, value in _tensors(guard, i).items()},
                      folder / f"rank_{own['rank']}.safetensors")  # fmt: skip
        if own["rank"] == 0:
            _write_step(folder, run, {"step": step, "seed": run.config.seed, "what": sentence, "samples": list(sources), "ranks": ranks})
    except (OSError, SafetensorError) as error:
        print(f"rank {own['rank']} cannot keep the step in {folder}: {error}", flush=True)
        return None
    return folder


def _made(folder: Path) -> bool:
    """Whether the folder is there, and not one too many."""
    try:
        if not folder.is_dir() and folder.parent.is_dir() and len(list(folder.parent.iterdir())) >= MOST:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        return True
    except OSError as error:
        print(f"cannot keep the step in {folder}: {error}", flush=True)
        return False


def _tensors(guard: Guard, index: int) -> dict[str, Any]:
    seen = guard.seen[index]
    batch = seen.batch
    named = {name: getattr(batch, name) for name in ("tokens", "labels", "loss_weight", "position_ids", "segment_ids")}
    return named | {f"columns.{name}": value for name, value in batch.columns.items()} | {"loss": seen.loss, "live": seen.live}


def _write_step(folder: Path, run: Any, record: dict[str, Any]) -> None:
    lines = [line for source in record["samples"] if (line := _line(source)) is not None]
    run_dir = run.config.run_dir
    weights = f"checkpoint.init={run_dir} " if newest(run_dir) else ""
    record["command"] = (
        f"megatron-plugin train {run_dir}/config.yaml run_dir={folder}/again data.train={folder}/samples.jsonl data.tokenizer={run_dir}/tokenizer "
        f"checkpoint.resume=auto {weights}train.steps=1 train.warmup_steps=0 data.packing=false train.micro_batch=1 train.global_batch={max(1, len(lines))} "
        "train.max_nonfinite=1"
    )
    record["note"] = (f"the command trains on every sample of the list, each in a row of its own, {'from the newest checkpoint' if weights else 'from the weights of the start'}, "
                      "on one rank unless started with torchrun")  # fmt: skip
    (folder / "samples.jsonl").write_bytes(b"".join(lines))
    (folder / "step.json").write_text(json.dumps(record, indent=1) + "\n")


def _line(source: str) -> bytes | None:
    """The line file:number of a data file; None where there is no such file."""
    path, _, number = source.rpartition(":")
    if not number.isdecimal() or not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        for place, line in enumerate(file, 1):
            if place == int(number):
                return line.rstrip(b"\r\n") + b"\n"
    return None


def _ranks(found: Sequence[dict[str, Any]]) -> str:
    numbers = sorted(x["rank"] for x in found)
    return f"rank{'s' if len(numbers) > 1 else ''} {_numbers(numbers)}"


def _numbers(values: Sequence[int]) -> str:
    return some_of(values, 16)
