"""What the objectives share: one product, one scalar, one check.  T: tokens of this call."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_scalar", "check_number", "weighted_nll"]

INF = float("inf")


def weighted_nll(weight_T: Tensor, logp_T: Tensor) -> Tensor:
    """-w log p per token, [T] nats, with 0 log 0 = 0.

    A label whose logit is a true -inf has weight 0 in every loss that weights by a power of p; its term and its gradient are 0, while
    0 * inf would be NaN.  A NaN logp (stray label) stays NaN under any weight, 0 included.
    """
    impossible_T = (weight_T == 0) & torch.isneginf(logp_T)
    return torch.where(impossible_T, 0.0, -weight_T * logp_T)


def as_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A parameter as a 0-d tensor with the dtype of `like`: fp64 statistics see fp64 parameters."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return like.new_full((), value)  # a fill kernel; as_tensor would copy from the host, which a CUDA graph capture forbids


def check_number(
    loss: str, name: str, value: float | Tensor, *, low: float = -INF, high: float = INF, above: float = -INF, infinite: bool = False
) -> None:
    """ValueError unless low <= value <= high, value > above, and finite unless `infinite`; tensors must be 0-d.

    The value of a tensor is not looked at: reading it would stop the device.
    """
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"loss '{loss}': {name} is a tensor of shape {list(value.shape)}; expected a number or a 0-d tensor")
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and low <= value <= high and (above == -INF or value > above) and (infinite or abs(value) < INF):
        return
    left = f"[{low:g}" if above == -INF and low > -INF else f"({above:g}"
    right = f"{high:g}]" if infinite or high < INF else "inf)"
    hint = "; YAML reads 1e-4 as text, write 1.0e-4" if isinstance(value, str) else ""
    raise ValueError(f"loss '{loss}': got {name}={value!r}, expected a number in {left}, {right} or a 0-d tensor{hint}")
