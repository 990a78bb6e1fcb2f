"""What can happen to the files of a checkpoint: 200 seeded mutations, one at a time, each looked for before a weight is used."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from functools import partial
from pathlib import Path

import torch.distributed as dist

from tests.faults.promises import Case

PROMISE = "a damaged checkpoint is found by its manifest before any weight is used, with the file's name, and the one before it is taken; none left: exit 3"
MUTATIONS, ROOT = 200, Path(__file__).parents[2]
GOLDEN = ROOT / "tests/trainer/golden/checkpoints/step_00000002"


def cases(*, full: bool) -> list[Case]:
    mutations = MUTATIONS if full else 20
    return [Case(f"{mutations} mutations", partial(mutations_found, mutations=mutations), mutations), Case("none left", none_left)]


def make(folder: Path, step: int) -> Path:
    """A checkpoint of the format written now, from the golden one's shards."""
    from megatron_plugin.trainer.manifest import FORMAT, digests, write_manifest

    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(GOLDEN, checkpoint)
    state = json.loads((checkpoint / "train_state.json").read_text()) | {"format": FORMAT, "step": step}
    (checkpoint / "train_state.json").write_text(json.dumps(state))
    write_manifest(checkpoint, digests(sorted(checkpoint.iterdir())))
    (folder / "checkpoints/latest").write_text(checkpoint.name)
    return checkpoint


def mutations_found(folder: Path, *, mutations: int) -> None:
    from megatron_plugin.trainer.checkpoint import usable

    missed = []
    with world_of_one(folder):
        for seed in range(mutations):
            run = folder / str(seed)
            good, newest = make(run, 2), make(run, 4)
            assert usable(run) == newest
            rng = random.Random(f"mutation {seed}")
            kind = list(KINDS)[seed % len(KINDS)]
            files = KINDS[kind](newest, rng)
            problem = damage_of(newest)
            if problem is None or not any(name in problem for name in files) or usable(run) != good:
                missed.append((seed, kind, files, problem))
            shutil.rmtree(run)
    assert not missed, missed


def none_left(folder: Path) -> None:
    from megatron_plugin.trainer.checkpoint import CheckpointError, usable

    with world_of_one(folder):
        for checkpoint in (make(folder, 2), make(folder, 4)):
            (checkpoint / "common.pt").unlink()
        try:
            raise AssertionError(f"{usable(folder)} was taken")
        except CheckpointError as error:
            assert error.exit_code == 3 and str(error).count("common.pt") == 2, error


def damage_of(checkpoint: Path) -> str | None:
    from megatron_plugin.trainer.manifest import damage

    found = damage(checkpoint)
    return found and found.what


@contextlib.contextmanager
def world_of_one(folder: Path):
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _any(checkpoint: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(checkpoint.iterdir()))


def _truncate(checkpoint, rng):
    path = _any(checkpoint, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return [path.name]


def _flip(checkpoint, rng):
    path = _any(checkpoint, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return [path.name]


def _delete(checkpoint, rng):
    path = _any(checkpoint, rng)
    path.unlink()
    return [path.name]


def _swap(checkpoint, rng):
    first, second = rng.sample(sorted(checkpoint.iterdir()), 2)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return [first.name, second.name]


def _empty(checkpoint, rng):
    path = _any(checkpoint, rng)
    path.write_bytes(b"")
    return [path.name]


def _longer(checkpoint, rng):
    path = _any(checkpoint, rng)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))
    return [path.name]


def _zeros(checkpoint, rng):
    """A block of zeros where a file system lost one."""
    path = _any(checkpoint, rng)
    data = path.read_bytes()
    start = rng.randrange(len(data))
    start = next((i for i in range(start, len(data)) if data[i]), next(i for i in range(len(data)) if data[i]))
    path.write_bytes(data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :])
    return [path.name]


def _edit_state(checkpoint, rng):
    path = checkpoint / "train_state.json"
    state = json.loads(path.read_text())
    state[rng.choice(["step", "vocab_size"])] += rng.choice([-1, 1])
    path.write_text(json.dumps(state))
    return [path.name]


def _edit_manifest(checkpoint, rng):
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    name = rng.choice(sorted(manifest["files"]))
    change = rng.randrange(6)
    if change == 0:
        del manifest["files"][name]
    elif change == 1:
        manifest["files"][name]["bytes"] += 1
    elif change == 2:
        manifest["files"][name]["sha256"] = "0" * 64
    elif change == 3:
        manifest["format"] = rng.choice([1, 3])
    elif change == 4:
        manifest["files"]["../" + name] = manifest["files"].pop(name)
    else:
        manifest = rng.choice([[], None, {}, {"files": []}, 7])
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return [path.name]


def _of_another(checkpoint, rng):
    """A file of the checkpoint before it, whose own manifest holds."""
    other = checkpoint.parent / "step_00000002"
    shutil.copy(other / "train_state.json", checkpoint / "train_state.json")
    return ["train_state.json"]


KINDS = {"truncated": _truncate, "bit flipped": _flip, "deleted": _delete, "swapped": _swap, "emptied": _empty, "longer": _longer, "zeros": _zeros,
         "state edited": _edit_state, "manifest edited": _edit_manifest, "of another": _of_another}  # fmt: skip
