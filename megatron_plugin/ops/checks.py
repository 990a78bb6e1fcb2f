"""What a caller may pass to the ops: shapes, dtypes and devices that fit each other, or a ValueError that says which do not."""

import torch
from torch import Tensor

from megatron_plugin.losses.contract import TokenInputs


def checked_labels(labels: Tensor, *, shape: tuple[int, ...], beside: str, like: Tensor) -> Tensor:
    """labels as contiguous int64 of `shape`; `beside` names the tensor `like` that they belong to."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integer ids, got {labels.dtype}; use labels.long() if they are ids")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"labels {list(labels.shape)} do not fit {beside} {list(like.shape)}: expected {list(shape)}, one id per row")
    if labels.device != like.device:
        raise ValueError(f"labels are on {labels.device}, {beside} on {like.device}; move the labels with labels.to({beside}.device)")
    return labels.long().contiguous()


def checked_inputs(inputs: TokenInputs | None, labels: Tensor) -> TokenInputs:
    """The inputs, or empty ones; one value per label each, constants of the step."""
    inputs = TokenInputs() if inputs is None else inputs
    for name, x in inputs.tensors().items():
        if x.shape != labels.shape or x.device != labels.device:
            raise ValueError(
                f"inputs.{name} is {list(x.shape)} on {x.device}; expected one value per label, {list(labels.shape)} on {labels.device}"
            )
        if x.requires_grad:
            raise ValueError(f"inputs.{name} requires a gradient; inputs are constants of the step: pass inputs.{name}.detach()")
    return inputs
