"""What the rank processes of tests/parallel/test_context.py run."""

import torch
import torch.distributed as dist

from megatron_plugin.parallel.context import context_gather, context_slice


def there_and_back(group, *, x, dim):
    """(this rank's slice, the slices gathered again)."""
    mine = context_slice(x, dim, group)
    return mine, context_gather(mine, dim, group)


def gathered_gradient(group, *, x, weights, dim):
    """Gradient of sum over ranks of (gathered x * the rank's weights), in this rank's slice of x."""
    mine = context_slice(x, dim, group).clone().requires_grad_()
    (context_gather(mine, dim, group) * weights[dist.get_rank(group)]).sum().backward()
    return mine.grad


def megatron_slice(group, *, batch):
    """megatron-core's own slices of a batch, and ours of the same tensors."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    from megatron_plugin.hooks.cpu_platform import cpu_platform

    with cpu_platform():
        theirs = get_batch_on_this_cp_rank(dict(batch), group)
    return theirs, {name: context_slice(x, 2 if name == "attention_mask" else 1, group) for name, x in batch.items()}


def error_of(group, *, op, shape, dim):
    """The text of the ValueError, or None."""
    try:
        {"slice": context_slice, "gather": context_gather}[op](torch.zeros(shape), dim, group)
    except ValueError as error:
        return str(error)
