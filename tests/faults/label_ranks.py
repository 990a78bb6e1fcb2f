"""What the rank processes of labels.py run: the statistics of fuzzed labels on a vocabulary cut over the ranks."""

from unittest import mock

import torch
import torch.distributed as dist

from megatron_plugin import token_stats
from megatron_plugin.kernels import cpu, eager
from megatron_plugin.kernels.backend import use_backend

TRUE, PADDED = 250, 256
"""Columns: the vocabulary, and what tensor parallelism of 4 pads it to."""


def fuzzed(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [T, 256], labels [T]): a third of the labels good, the rest masked, negative, in the padding, just outside, or huge."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, PADDED, generator=random) * 10 ** torch.randint(-2, 4, (rows, 1), generator=random)
    pick = lambda low, high: torch.randint(low, high, (rows,), generator=random)  # noqa: E731
    kinds = torch.stack([pick(0, TRUE), pick(0, TRUE), torch.full((rows,), -100), pick(-99, 0), pick(-(2**62), -100), pick(TRUE, PADDED),
                         pick(PADDED, 2 * PADDED), pick(2**31 - 4, 2**31 + 4), pick(2**40, 2**62)])  # fmt: skip
    return logits, kinds.gather(0, pick(0, len(kinds))[None])[0]


def unchecked(group, *, rows: int, seed: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """logp [T] and whether dz [T] is finite, with the check that a CPU makes taken out: what a GPU does, where nothing can raise."""
    logits, labels = fuzzed(rows, seed)
    shard = logits.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)].clone().requires_grad_()
    with mock.patch.object(eager, "raise_if_stray", lambda *_: None), mock.patch.object(cpu, "raise_if_stray", lambda *_: None), use_backend(backend):
        stats = token_stats(shard, labels, tp_group=group, vocab_size=TRUE)
        stats.logp.sum().backward()
    return stats.logp.detach(), shard.grad


def checked(group, *, rows: int, seed: int, backend: str) -> list[str | None]:
    """The error of each label on its own, None where there is none."""
    logits, labels = fuzzed(rows, seed)
    shard, errors = logits.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)], []
    for row in range(rows):
        try:
            with use_backend(backend):
                token_stats(shard[row : row + 1], labels[row : row + 1], tp_group=group, vocab_size=TRUE)
            errors.append(None)
        except ValueError as error:
            errors.append(str(error))
    return errors
