"""The two row kernels as torch.library ops on one shard, so that torch.compile, fake tensors and profilers see them as one node.

    megatron_plugin::stats(logits [T, V], labels [T]) -> partials [T, 4]
    megatron_plugin::grad(logits, labels, rows [T, 4], grads [T, 3]) -> dlogits [T, V]          grad_ writes over the logits
"""

import torch
from torch import Tensor

from megatron_plugin.kernels.backend import select
from megatron_plugin.kernels.cpu import grad_cpp, stats_cpp
from megatron_plugin.kernels.eager import grad_eager, stats_eager
from megatron_plugin.kernels.layout import Shard, empty_like_rows, row_stride_like


@torch.library.custom_op("megatron_plugin::stats", mutates_args=())
def stats(logits: Tensor, labels: Tensor, vocab_start: int, vocab_size: int, ignore_index: int, temperature: float) -> Tensor:
    shard = Shard(vocab_start, vocab_size, ignore_index, temperature)
    backend = select(logits)
    if backend == "triton":
        from megatron_plugin.kernels.stats import stats_triton as run
    else:
        run = stats_cpp if backend == "cpp" else stats_eager
    return run(logits, labels, shard)


@stats.register_fake
def _(logits, labels, vocab_start, vocab_size, ignore_index, temperature):
    return logits.new_empty((logits.shape[0], 4), dtype=torch.promote_types(logits.dtype, torch.float32))


def write_grad(logits: Tensor, out: Tensor, labels: Tensor, rows: Tensor, grads: Tensor, shard: Shard) -> None:
    """dF/dlogits [T, V] into `out` by the selected implementation; autograd and its version counters do not see it."""
    backend = select(logits)
    if backend == "triton":
        from megatron_plugin.kernels.grad import grad_triton as run
    else:
        run = grad_cpp if backend == "cpp" else grad_eager
    run(logits, out, labels, rows, grads, shard)


@torch.library.custom_op("megatron_plugin::grad", mutates_args=())
def grad(
    logits: Tensor, labels: Tensor, rows: Tensor, grads: Tensor,
    vocab_start: int, vocab_size: int, ignore_index: int, temperature: float,
) -> Tensor:
    out = empty_like_rows(logits)
    write_grad(logits, out, labels, rows, grads, Shard(vocab_start, vocab_size, ignore_index, temperature))
    return out


@grad.register_fake
def _(logits, labels, rows, grads, vocab_start, vocab_size, ignore_index, temperature):
    return logits.new_empty_strided(logits.shape, (row_stride_like(logits), 1))


@torch.library.custom_op("megatron_plugin::grad_", mutates_args=("logits",))
def grad_(
    logits: Tensor, labels: Tensor, rows: Tensor, grads: Tensor,
    vocab_start: int, vocab_size: int, ignore_index: int, temperature: float,
) -> None:
    write_grad(logits, logits, labels, rows, grads, Shard(vocab_start, vocab_size, ignore_index, temperature))


@grad_.register_fake
def _(logits, labels, rows, grads, vocab_start, vocab_size, ignore_index, temperature):
    return None
