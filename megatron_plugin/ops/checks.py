"""What a caller may pass to the ops: shapes, dtypes and devices that fit each other, or a ValueError that says which do not."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.objective import Number
from megatron_plugin.losses.contract import TokenInputs
from megatron_plugin.parallel.vocab import shard_of


def check_type(name: str, got: object, expected: type, remedy: str) -> None:
    if not isinstance(got, expected):
        raise ValueError(f"{name} is of type {type(got).__name__}, expected {expected.__name__}: {remedy}")


def check_number(name: str, got: object, kind: str = "__float__") -> None:
    """A number of Python or NumPy; `kind` '__index__': a whole one.  A tensor is none: reading it could stall the queue."""
    if not isinstance(got, (int, float) if kind == "__float__" else int) and (isinstance(got, Tensor) or not hasattr(got, kind)):
        raise ValueError(f"{name}={got!r} is of type {type(got).__name__}, expected {'a' if kind == '__float__' else 'a whole'} number")


def check_grad_scale(name: str, scale: Number, like: Tensor) -> None:
    """The factor that a backward will bring, a finite number other than 0; the value of a tensor is not looked at."""
    if isinstance(scale, Tensor):
        if scale.dim() or not scale.is_floating_point() or scale.requires_grad or scale.device != like.device:
            raise ValueError(
                f"{name} is {scale.dtype} {list(scale.shape)} on {scale.device}: expected a number, or a 0-d floating tensor without "
                f"gradient on {like.device}"
            )
        return
    check_number(name, scale)
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"{name}={scale}: expected a finite number other than 0, the factor that the backward brings")


def checked_shard(
    columns: int, group: dist.ProcessGroup | None, *, vocab_start: int | None, vocab_size: int | None, temperature: float, ignore_index: int
) -> Shard:
    """The shard that `columns` of this rank are (parallel.vocab.shard_of), of options that are numbers."""
    for name, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size), ("ignore_index", ignore_index)):
        if value is not None or name == "ignore_index":
            check_number(name, value, "__index__")
    check_number("temperature", temperature)
    if temperature == math.inf:
        raise ValueError("temperature=inf is not finite; logits are divided by it")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"the tensor-parallel group is of type {type(group).__name__}, expected a torch.distributed.ProcessGroup, or None")
    return shard_of(columns, group, vocab_start=vocab_start, vocab_size=vocab_size, temperature=temperature, ignore_index=ignore_index)


def checked_labels(labels: Tensor, *, shape: tuple[int, ...], beside: str, like: Tensor) -> Tensor:
    """labels as contiguous int64 of `shape`; `beside` names the tensor `like` that they belong to."""
    check_type("labels", labels, Tensor, "one integer id per row; from numbers: torch.tensor(labels)")
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
    check_type("inputs", inputs, TokenInputs, "inputs=TokenInputs(coefficient=..., advantage=...)")
    check_type("inputs.extra", inputs.extra, Mapping, "extra={name: tensor}")
    for name, x in inputs.tensors().items():
        check_type(f"inputs.{name}", x, Tensor, f"one value per label, {list(labels.shape)} on {labels.device}")
        if x.shape != labels.shape or x.device != labels.device:
            raise ValueError(
                f"inputs.{name} is {list(x.shape)} on {x.device}; expected one value per label, {list(labels.shape)} on {labels.device}"
            )
        if x.requires_grad:
            raise ValueError(f"inputs.{name} requires a gradient; inputs are constants of the step: pass inputs.{name}.detach()")
    return inputs
