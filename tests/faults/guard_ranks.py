"""What the rank processes of nonfinite.py and spikes.py run: a real training run in which this file spoils numbers of chosen steps."""

import contextlib
import hashlib
import io
import logging
import os
from unittest import mock

import torch
import torch.distributed as dist

from megatron_plugin.config import load_config
from megatron_plugin.kernels.head import Projection
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.trainer import loop, supervised

KINDS = ("nan", "inf", "all -inf")


def digest(run) -> str:
    """Of this rank's weights and moments."""
    parts = hashlib.sha256()
    optimizers = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    moments = [x for o in optimizers for state in o.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    for tensor in [p.data for chunk in run.chunks for p in chunk.parameters()] + moments:
        parts.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else str(float(tensor)).encode())
    return parts.hexdigest()


class Spoiler:
    """While `kind` is set: a row of the logits of this rank, or of its stage's output, is not what was computed."""

    kind: str | float | None = None
    ready = False

    def spoil(self, value_RC: torch.Tensor) -> torch.Tensor:
        """The first row of a chunk; all rows for -inf: only where the label is in this shard does it make a loss infinite."""
        if self.kind is None:
            return value_RC
        value_RC = value_RC.clone()
        if isinstance(self.kind, float):
            return value_RC.mul_(self.kind)
        rows = slice(None) if self.kind == "all -inf" else slice(0, 1)
        value_RC[rows] = {"nan": torch.nan, "inf": torch.inf, "all -inf": -torch.inf}[self.kind]
        return value_RC

    def logits(self, original):
        def spoiled(projection, x):
            z = original(projection, x)
            return z.copy_(self.spoil(z))  # in its buffer: the gradient goes there

        return spoiled

    def start(self, original):
        def started(config):
            run = original(config)
            if not run.handle.active:  # no logits on this stage: what leaves it
                run.chunks[0].module.decoder.register_forward_hook(lambda module, args, out: self.spoil(out))
            return run

        return started


def train(group, *, overrides: dict, faults: dict[int, tuple[int, str | float]]) -> dict:
    """{"unchanged": by step, whether weights and moments stayed; "lines": metrics; "error": text; "said": the warnings}.

    faults: step -> (rank, kind), a kind of KINDS or a factor of the logits."""
    config = load_config("configs/debug_cpu.yaml", [f"{key}={value}" for key, value in overrides.items()], world_size=group.size())
    spoiler, unchanged, said = Spoiler(), {}, io.StringIO()
    handler, original = logging.StreamHandler(said), supervised.optimizer_step

    def stepping(guard, gradients, samples):
        step, before = guard.run.step + 1, digest(guard.run)
        rank, kind = faults.get(step, (None, None))
        spoiler.kind = kind if rank == dist.get_rank() or rank == -1 else None
        try:
            return original(guard, gradients, samples)
        finally:
            spoiler.kind = None
            unchanged[step] = digest(guard.run) == before

    error = None
    log = logging.getLogger("megatron_plugin")
    log.addHandler(handler)
    try:
        with (
            mock.patch.object(supervised, "optimizer_step", stepping), mock.patch.object(Projection, "logits", spoiler.logits(Projection.logits)),
            mock.patch.object(loop, "start", spoiler.start(loop.start)), contextlib.redirect_stdout(io.StringIO()),
        ):  # fmt: skip
            loop.train(config)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        log.removeHandler(handler)
    return {"unchanged": unchanged, "lines": read_metrics(config.run_dir), "error": error, "said": said.getvalue()}


def hashes(group, *, overrides: dict) -> list[dict]:
    """Loss, gradient norm and digest of this rank after every step, as they are: no rounding."""
    config = load_config("configs/debug_cpu.yaml", [f"{key}={value}" for key, value in overrides.items()], world_size=group.size())
    original, found = supervised.optimizer_step, []

    def stepping(guard, gradients, samples):
        means = original(guard, gradients, samples)
        found.append({"loss": means["lm loss"].hex(), "grad_norm": means["grad_norm"].hex(), "hash": digest(guard.run)})
        return means

    with mock.patch.object(supervised, "optimizer_step", stepping), contextlib.redirect_stdout(io.StringIO()):
        loop.train(config)
    return found


def memory(group, *, overrides: dict, every: int) -> list[dict]:
    """Resident bytes and open files of this rank after every `every` steps."""
    config = load_config("configs/debug_cpu.yaml", [f"{key}={value}" for key, value in overrides.items()], world_size=group.size())
    original, found = supervised.optimizer_step, []

    def stepping(guard, gradients, samples):
        means = original(guard, gradients, samples)
        if guard.run.step % every == 0:
            pages = int(open("/proc/self/statm").read().split()[1])
            found.append({"step": guard.run.step, "rss": pages * os.sysconf("SC_PAGESIZE"), "files": len(os.listdir("/proc/self/fd"))})
        return means

    with mock.patch.object(supervised, "optimizer_step", stepping), contextlib.redirect_stdout(io.StringIO()):
        loop.train(config)
    return found
