"""What the rank processes of test_saving.py run: checkpoints of a model of one layer."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

TINY = ("model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2")


@contextlib.contextmanager
def tiny(group):
    """(chunks, optimizer)"""
    from megatron_plugin.config import load_config
    from megatron_plugin.trainer import model
    from megatron_plugin.trainer.world import world

    config = load_config("configs/debug_cpu.yaml", [*TINY, f"parallel.tensor={group.size()}"], world_size=group.size())
    with contextlib.redirect_stdout(io.StringIO()), world(config):
        transformer = model.transformer_config(config)
        chunks = model.build_model(config, transformer, 64)
        yield chunks, model.build_optimizer(config, transformer, chunks)[0]


def state(step: int) -> dict:
    return {"step": step, "data": None, "vocab_size": 64}


def kept(group, *, run_dir: Path) -> dict:
    """What is there after five saves of which two newest and the best are kept, and a restart in between."""
    from megatron_plugin.trainer.saving import Saver

    folder, found = Path(run_dir) / "checkpoints", {}
    with tiny(group) as (chunks, optimizer):
        saver = Saver(run_dir, keep=2, best="eval/heldout_nll")
        for step, value in ((1, 3.0), (2, 2.0), (3, 2.5)):
            saver.save(state(step), chunks, optimizer)
            if saver.is_better(value):
                saver.mark_best(step, value)
        assert set(saver.metrics()) == {"perf/save_s"} and saver.metrics() == {}
        if group.rank() == 0:
            (folder / "step_00000009.writing-0123abcd").mkdir()
            (folder / "step_00000003").rename(folder / "step_00000003.replaced")  # as a kill between two renames leaves it
        dist.barrier()
        saver = Saver(run_dir, keep=2, best="eval/heldout_nll")
        found["after the restart"] = sorted(path.name for path in folder.iterdir())
        found["better"] = [saver.is_better(value) for value in (2.5, 2.0, 1.9, math.nan)]
        found["other metric"] = Saver(run_dir, keep=2, best="eval/heldout_accuracy").is_better(0.0)
        dist.barrier()
        for step in (4, 5):
            saver.save(state(step), chunks, optimizer)
        found |= {"names": sorted(path.name for path in folder.iterdir()), "latest": (folder / "latest").read_text(), "best": json.loads((folder / "best").read_text())}
        dist.barrier()
    return found


def tried(group, *, run_dir: Path) -> dict:
    """In which order a resume tries checkpoints, and what it does with damaged ones."""
    from megatron_plugin.trainer.checkpoint import candidates, usable
    from megatron_plugin.trainer.saving import Saver

    folder, said, found = Path(run_dir) / "checkpoints", [], {}
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_plugin").addHandler(handler)
    order = lambda: [int(path.name[5:]) for path in candidates(run_dir)]  # noqa: E731
    try:
        with tiny(group) as (chunks, optimizer):
            saver = Saver(run_dir, keep=0)
            for step in (2, 4, 6, 8):
                saver.save(state(step), chunks, optimizer)
            found["in order"] = order()
            saver.save(state(5), chunks, optimizer)  # somebody has gone back to 4
            found["gone back"] = order()
            saver.save(state(7), chunks, optimizer)
            dist.barrier()
            if group.rank() == 0:  # a kill between the rename of 7 and the move of `latest`
                (folder / "latest").write_text("step_00000005\n")
                os.utime(folder / "latest", ns=(time := (folder / "step_00000005/manifest.json").stat().st_mtime_ns, time))
            dist.barrier()
            found["killed"] = order()[:2]
            if group.rank() == 0:
                path = folder / "step_00000007" / "common.pt"
                path.write_bytes(path.read_bytes()[:-1])
            dist.barrier()
            found["used"] = usable(run_dir, rename=True).name
            found["names"] = sorted(path.name for path in folder.iterdir() if path.is_dir())
            found["said"] = said
    finally:
        logging.getLogger("megatron_plugin").removeHandler(handler)
    return found


def on_disk(group, *, run_dir: Path) -> list[str]:
    """What was not on disk when the checkpoint got its name, or when `latest` was moved: from the order of fsync, rename and replace."""
    from megatron_plugin.trainer.saving import Saver

    done: list[tuple[str, str]] = []
    originals = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(file):
        done.append(("fsync", os.readlink(f"/proc/self/fd/{file}")))
        return originals["fsync"](file)

    def moved(kind):
        def move(source, target, **named):
            done.append((kind, str(target)))
            return originals[kind](source, target, **named)

        return move

    with tiny(group) as (chunks, optimizer):
        saver = Saver(run_dir, keep=2)
        os.fsync, os.rename, os.replace = fsync, moved("rename"), moved("replace")
        try:
            saver.save(state(1), chunks, optimizer)
        finally:
            os.fsync, os.rename, os.replace = originals.values()
    everyone: list = [None] * group.size()
    dist.all_gather_object(everyone, done)
    folder = Path(run_dir) / "checkpoints"
    final = folder / "step_00000001"
    named = next(i for i, act in enumerate(everyone[0]) if act == ("rename", str(final)))
    before = {path for kind, path in everyone[0][:named] if kind == "fsync"} | {path for own in everyone[1:] for kind, path in own if kind == "fsync"}
    writing = next(Path(path).parent for path in before if path.endswith("common.pt"))
    wanted = [writing / path.name for path in final.iterdir()] + [writing]
    reached = {path.replace(".writing", "") if "/." in path else path for path in before} | before
    missing = [str(path) for path in wanted if str(path) not in reached and str(path.with_name(f".{path.name}.writing")) not in before]
    pointer = next(i for i, act in enumerate(everyone[0]) if act == ("replace", str(folder / "latest")))
    missing += [] if pointer > named and ("fsync", str(folder)) in everyone[0][named:pointer] else ["the new name"]
    return missing


def failed(group, *, run_dir: Path) -> tuple[list, str]:
    """Metrics and text when the directory cannot even be made, three times."""
    from megatron_plugin.trainer.saving import SaveError, Saver

    with tiny(group) as (chunks, optimizer):
        Path(run_dir).mkdir(exist_ok=True)
        (Path(run_dir) / "checkpoints").touch()
        saver, metrics = Saver(run_dir, keep=2), []
        dist.barrier()
        try:
            for step in range(1, 9):
                saver.save(state(step), chunks, optimizer)
                metrics.append(saver.metrics()["checkpoint/failed"])
        except SaveError as error:
            return metrics, f"{error} (exit {error.exit_code})"
    return metrics, ""


def asynchronous(group, *, run_dir: Path) -> dict:
    """One rank's writer fails in a thread: said by the next poll on every rank, and the next save is good."""
    from megatron_plugin.hooks.dist_checkpoint import Shards
    from megatron_plugin.trainer.checkpoint import load_checkpoint, usable
    from megatron_plugin.trainer.saving import Saver

    found, write = {}, Shards.write
    with tiny(group) as (chunks, optimizer):
        saver = Saver(run_dir, keep=2, asynchronous=True)
        if group.rank() == group.size() - 1:
            def fails(shards):
                write(shards)
                raise OSError(28, "No space left on device")

            Shards.write = fails
        try:
            saver.save(state(1), chunks, optimizer)
            found["during"] = saver.saved
            while saver._writing is not None:
                saver.poll()
            found["after"] = saver.saved, saver.metrics()["checkpoint/failed"]
        finally:
            Shards.write = write
        weight = next(iter(chunks[0].module.parameters()))
        weight.data.fill_(7.0)
        saver.save(state(2), chunks, optimizer)
        weight.data.fill_(-1.0)
        saver.finish()
        found["next"] = saver.saved
        load_checkpoint(usable(run_dir), chunks, optimizer, verified=True)
        found["weight"] = bool(torch.all(weight == 7.0))
    return found
