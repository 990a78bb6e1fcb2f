"""The oracle: every op of this folder in its shortest form, in fp64 unless told otherwise.  Gradients by autograd."""

import torch
from torch import Tensor


def token_stats_reference(
    logits: Tensor, labels: Tensor, *, vocab_size: int | None = None, temperature: float = 1.0, ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse) of logits [..., V] at labels [...], nats; 0 in masked rows.  Columns from vocab_size on are left out."""
    live = labels != ignore_index
    z = torch.where(live[..., None], logits[..., :vocab_size].to(dtype), 0.0) / temperature
    lse = z.logsumexp(-1)
    logp_all = z.log_softmax(-1)
    entropy = -torch.where(logp_all == -torch.inf, 0.0, logp_all.exp() * logp_all.clamp(min=torch.finfo(dtype).min)).sum(-1)
    logp = logp_all.gather(-1, labels.where(live, 0)[..., None])[..., 0]
    return tuple(torch.where(live, x, 0.0) for x in (logp, entropy, lse))


def grad_reference(logits: Tensor, labels: Tensor, grads: Tensor, **where) -> Tensor:
    """dF/dlogits [T, V] in fp64 from grads [T, 3] = (dF/dlogp, dF/dH, dF/dlse)."""
    z = logits.detach().double().requires_grad_()
    stats = torch.stack(token_stats_reference(z, labels, **where), -1)
    (dz,) = torch.autograd.grad(stats, z, grads.double())
    return dz
