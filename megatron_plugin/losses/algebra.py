"""What the objectives share: products, scalars, checks.  T: tokens of this call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_plugin.kernels.token_stats import TokenStats

__all__ = ["as_scalar", "check_choice", "check_number", "is_neutral", "of_tokens", "weighted_nll"]

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


def check_choice(loss: str, name: str, value: object, choices: Iterable[str]) -> None:
    """ValueError unless `value` is one of the names in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"loss '{loss}': got {name}={value!r}, expected one of {', '.join(choices)}")


def is_neutral(value: float | str | Tensor, neutral: float) -> bool:
    """Whether a parameter is known to change nothing.  A tensor never is: reading it would stop the device."""
    return not isinstance(value, Tensor) and value == neutral


def of_tokens(chosen_T: Tensor, stats: TokenStats) -> TokenStats:
    """`stats` where `chosen_T` ([T] bool), 0 elsewhere, with exactly no gradient there.

    For a term of some tokens only: what the others' inputs hold (NaN where nothing was sampled) stays out of their gradient, which
    `where` on the finished terms alone would not do, since 0 * NaN is NaN.
    """
    return TokenStats(*(torch.where(chosen_T, column, 0.0) for column in stats))
