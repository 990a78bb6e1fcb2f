"""What the rank processes of test_scale.py measure: bytes of every collective of a step, and of what a rank holds."""

import contextlib
import io
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.trainer.ranks import _config


class Traffic(TorchDispatchMode):
    """Counts what goes to torch.distributed: {(operation, ranks of the group): [calls, bytes of the tensors that this rank gives or, of a gather, gets]}."""

    def __init__(self):
        super().__init__()
        self.found: Counter[tuple[str, int, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func.name().partition("::")
        if space == "c10d" and not name.startswith("barrier"):
            tensors = [x for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
            group = next((x for x in args if isinstance(x, torch.ScriptObject)), None)
            ranks = dist.ProcessGroup.unbox(group).size() if group is not None else 0
            key = name.split(".")[0].strip("_"), ranks
            self.found[(*key, "calls")] += 1
            self.found[(*key, "bytes")] += sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


def step(group, *, overrides: dict) -> dict:
    """Of the second step of a run: its traffic, what this rank holds, tokens with a loss in each micro-batch of it, bytes of the weights as they are sent."""
    from megatron_plugin.hooks.weights import hf_tensors
    from megatron_plugin.trainer.memory import state_bytes
    from megatron_plugin.trainer.run import start
    from megatron_plugin.trainer.supervised import Supervised
    from megatron_plugin.trainer.world import world

    config = _config(overrides, group.size())
    with contextlib.redirect_stdout(io.StringIO()), world(config):
        run = start(config)
        source = Supervised(run)
        source.step()
        with Traffic() as traffic:
            source.step()
        tokens = tuple(int(seen.live.sum()) for seen in source.guard.seen)
        sent = sum(x.numel() * x.element_size() for _, x in hf_tensors(run.chunks, vocab_size=run.data.vocab_size)) if group.size() == 1 else 0
        return {"traffic": dict(traffic.found), "held": state_bytes(run), "tokens": tokens, "vocabulary": run.data.vocab_size, "sent": sent}
