"""What the hidden-in ops ask of other ranks, as callables: this folder knows no process groups.  R ranks, n rows, H hidden."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_plugin.kernels.token_stats import Gather, one_shard

Pending = Callable[[], Tensor]
"""A transfer under way: waits for it (on a GPU: makes the queue wait) and returns its result."""


def at_once(x: Tensor) -> Pending:
    """The transfer of a model that is not split."""
    return lambda: x


@dataclass(frozen=True)
class Exchange:
    """Between the ranks that share a vocabulary.  All of them make the same calls in the same order."""

    slices: int = 1
    """Equal slices, in rank order, that the tokens' hidden states lie in: R under sequence parallelism, otherwise 1."""
    gather_partials: Gather = one_shard
    """Partials [n, 4] of this shard -> [R, n, 4]."""
    gather_hidden: Callable[[Tensor], Pending] = at_once
    """Starts [n, H] of this slice -> [slices * n, H], slice by slice."""
    reduce_dx: Callable[[Tensor], Pending] = at_once
    """Starts the sum over ranks of [slices * n, H] -> [n, H] of this slice; may work in place."""
