"""Rows that break softmax kernels, and the comparison every kernel test makes."""

import torch
from torch import Tensor

from megatron_plugin.kernels.backend import use_backend
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.token_stats import TokenStats, token_stats


def rows(kind: str, T: int, V: int, generator: torch.Generator | None = None) -> Tensor:
    """[T, V] fp32 logits of one kind."""
    z = torch.randn(T, V, generator=generator)
    match kind:
        case "normal":
            return z * 3
        case "flat":       # entropy near log V: t/s is all cancellation
            return z * 1e-3
        case "peaked":     # p of one column within 1e-6 of 1
            return z.scatter(1, torch.arange(T)[:, None] % V, 30.0)
        case "offset":     # lse far from 0: logp as z - lse loses 3 digits
            return z * 3 + 1e4
        case "negative_offset":
            return z * 3 - 1e4
        case "masked_columns":  # -inf columns, as grammar masks leave them; column 0 stays
            return z.masked_fill(torch.rand(T, V) < 0.3, -torch.inf).index_fill(1, torch.tensor([0]), 1.0)
        case "rising":     # the maximum moves in every block
            return torch.linspace(-20, 20, V).expand(T, V) + z * 0.1
    raise KeyError(kind)


KINDS = ("normal", "flat", "peaked", "offset", "negative_offset", "masked_columns", "rising")


def run(backend: str, logits: Tensor, labels: Tensor, grads_T3: Tensor, *, vocab_size: int | None = None, temperature: float = 1.0,
        overwrite: bool = False) -> tuple[TokenStats, Tensor]:
    """Statistics (on the host) and the gradient of sum(grads * (logp, entropy, lse)) (where the logits are) through one backend."""
    logits = logits.detach().requires_grad_()
    shard = Shard(0, vocab_size or logits.shape[1], -100, temperature)
    with use_backend(backend):
        stats = token_stats(logits, labels, shard, overwrite_logits=overwrite)
        (grad,) = torch.autograd.grad(stats, logits, tuple(grads_T3.to(stats.logp.dtype).unbind(1)))
    return TokenStats(*(x.detach().cpu() for x in stats)), grad
