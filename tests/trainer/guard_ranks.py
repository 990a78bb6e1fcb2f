"""What the rank processes of test_guard.py run."""

import contextlib
import io

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_plugin.trainer import supervised
from megatron_plugin.trainer.guard import Guard
from megatron_plugin.trainer.run import start
from megatron_plugin.trainer.supervised import Supervised
from megatron_plugin.trainer.world import world
from tests.trainer.ranks import _config

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU.  A copy to the host is counted unless it is non_blocking."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        self.count += name in READS
        return func(*args, **(kwargs or {}))


def reads_of_a_step(group, *, overrides: dict) -> tuple[int, int]:
    """(of what follows the gradients in our step, of megatron-core's prepare_grads, get_grad_norm and step alone)."""
    with contextlib.redirect_stdout(io.StringIO()), world(_config(overrides, group.size())):
        run = start(_config(overrides, group.size()))
        source, reads = Supervised(run), Reads()
        formed = supervised.run_rows

        def gradients(*arguments, **named):
            means = formed(*arguments, **named)
            reads.__enter__()
            return means

        supervised.run_rows = gradients
        try:
            source.step()
        finally:
            reads.__exit__(None, None, None)
            supervised.run_rows = formed
        with Reads() as alone:
            run.optimizer.prepare_grads()
            float(run.optimizer.get_grad_norm())
            run.optimizer.step()
        return reads.count, alone.count


def strays(group, *, overrides: dict) -> list[float]:
    """[strays counted, live tokens] of a micro-batch whose labels are partly outside the vocabulary, as on a GPU, where the op does not raise."""
    from megatron_plugin.data import PackedBatch
    from megatron_plugin.losses.reduction import LossOutput, PerToken

    config = _config(overrides, group.size())
    with contextlib.redirect_stdout(io.StringIO()), world(config):
        run = start(config)
        guard, size = Guard(run), run.data.vocab_size
        labels = torch.tensor([[0, size - 1, size, 383, 2**40, -1, -99, -101, -100, size]])
        live = torch.tensor([[True] * 8 + [False, False]])  # what is masked is not counted
        values = torch.zeros(labels.shape)
        output = LossOutput(values.sum(), live.sum(), {}, PerToken(values, values, values, values))
        batch = PackedBatch(labels, labels, values, labels, labels)
        return guard.look(output, batch, live)["stray_labels"].tolist()
