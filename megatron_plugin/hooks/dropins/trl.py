"""Hugging Face's Trainer, and TRL's SFTTrainer on top of it: `SFTTrainer(..., compute_loss_func=loss_func("dft"))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenLoss
from megatron_plugin.ops import token_loss

__all__ = ["loss_func"]


def loss_func(loss: str | Callable | TokenLoss, **params: float | str | Tensor) -> Callable[..., Tensor]:
    """A compute_loss_func(outputs, labels, num_items_in_batch=None) -> 0-d loss for any loss that needs no inputs beside the labels.

    outputs.logits [b, s, V]; labels [b, s] as the collators make them: not shifted, -100 where there is no loss.  The sum over tokens is
    divided by num_items_in_batch, which is Trainer's count over all micro-batches and devices of the step, or by the tokens of this batch."""
    bound = bind(loss, **params)

    def compute_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        output = token_loss(outputs.logits, shifted.contiguous(), bound)
        count = output.num_tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=labels.device)
        return output.loss_sum / count.clamp(min=1)

    return compute_loss_func
