"""What the rank processes of test_perf.py run."""

import contextlib
import io

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.utils.flop_counter import FlopCounterMode

from megatron_plugin.hooks.cpu_platform import cpu_platform
from megatron_plugin.trainer.flops import GPTSizes
from tests.trainer.ranks import _config


def flops(group, *, overrides: dict) -> tuple[float, float]:
    """(what torch counts in forward and backward of a megatron GPTModel, what the formula says with the whole attention matrix)."""
    from megatron_plugin.trainer.model import build_model, transformer_config

    config, rows = _config(overrides, 1), 2
    with contextlib.redirect_stdout(io.StringIO()), cpu_platform():
        parallel_state.initialize_model_parallel(1, 1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        transformer = transformer_config(config)
        (model,) = build_model(config, transformer, 384)
        length = config.data.seq_length
        tokens = torch.randint(0, 384, (rows, length))
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None].expand(rows, 1, length, length)
        with FlopCounterMode(display=False) as counter:
            model(tokens, torch.arange(length).expand(rows, length), mask).float().logsumexp(-1).sum().backward()
        parallel_state.destroy_model_parallel()
    sizes = GPTSizes.of(transformer, 384)
    return counter.get_total_flops(), sizes.step(tokens=rows * length, length=length, causal=False)


def out_of_memory(group, *, overrides: dict, how: str) -> tuple[str, int]:
    """(text, exit code) of the error that a run ends with whose loss asks for too much in its second step.  The step is counted by a patch."""
    from megatron_plugin.trainer.loop import train
    from megatron_plugin.trainer.memory import OutOfMemoryError
    from megatron_plugin.trainer.supervised import Supervised
    from tests.trainer import greedy_loss

    def counted(self):
        greedy_loss.step += 1
        return step(self)

    greedy_loss.HOW, greedy_loss.step, step = how, 0, Supervised.step
    Supervised.step = counted
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train(_config(overrides, group.size()))
    except OutOfMemoryError as error:
        return str(error), error.exit_code
    finally:
        Supervised.step = step
    return "", 0
