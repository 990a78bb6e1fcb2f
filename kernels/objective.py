"""What a one-pass op asks of a loss: terms and derivatives per token, in PyTorch or inside the kernel.  T tokens, C columns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_plugin.kernels.token_stats import TokenStats

COLUMNS = ("weighted_loss", "loss", "logp", "entropy", "weight", "token_prob", "weight_sq", "reach", "entropy_bonus", "z_loss")
"""Rows of the table that every one-pass op fills, before the loss's own metrics; 0 where a token is masked.

weighted_loss: loss x coefficient.  weight_sq: weight^2.  reach: max(|a|, |b|, |c|) with the coefficient, without grad_scale.
entropy_bonus, z_loss: what the regularisers added to the loss.
"""

INPUTS = ("coefficient", "advantage", "old_logp", "rollout_logp", "ref_logp", "expert")
"""Per-token inputs in the order of the twin ABI (weighting.py)."""

MAX_PARAMS = 8
"""Parameters p0 .. p7 of the twin ABI."""

Number = float | Tensor


@dataclass(frozen=True)
class Twin:
    """The in-kernel form of a loss (weighting.py) with its parameters."""

    fn: Callable
    """A @triton.jit function of the twin ABI."""
    params: tuple[Number, ...] = ()
    """At most MAX_PARAMS numbers or 0-d tensors, in the order of the ABI."""
    metrics: int = 0
    """How many metrics it returns after the weight."""


@dataclass(frozen=True)
class Objective:
    """A token-local loss bound to the tokens of one call."""

    terms: Callable[[TokenStats, Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
    """(statistics [T], live [T] bool, inputs of those rows) -> table [C, T] and (a, b, c) [T, 3] with the coefficient, 0 where not live."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """[T] tensors by name; those of INPUTS reach the twin."""
    grad_scale: Number = 1.0
    """Factor on the gradient alone: what the backward will bring, known before it."""
    entropy_bonus: Number = 0.0
    z_loss: Number = 0.0
    twin: Twin | None = None

    def at(self, rows: slice | Tensor) -> "Objective":
        """The same objective for some of the tokens, by slice or by index."""
        return replace(self, inputs={name: x[rows] for name, x in self.inputs.items()})


def scaled(grads_T3: Tensor, grad_scale: Number) -> Tensor:
    """(a, b, c) times the gradient's scale; a scale of 1 costs nothing."""
    if isinstance(grad_scale, Tensor):
        return grads_T3 * grad_scale.to(grads_T3.dtype)
    return grads_T3 if grad_scale == 1.0 else grads_T3 * grad_scale


def empty_table(columns: int, tokens: int, like: Tensor) -> Tensor:
    """An uninitialised table of `columns` in at least fp32, on the device of `like`."""
    return like.new_empty(columns, tokens, dtype=torch.promote_types(like.dtype, torch.float32))
