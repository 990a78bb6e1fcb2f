"""A loss for every framework whose training step is a megatron-core forward_step: Megatron-LM, Megatron-Bridge and what was made of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_plugin.hooks.attach import Handle, attach
from megatron_plugin.hooks.report import metric_pairs

__all__ = ["with_loss"]


def with_loss(forward_step: Callable, loss: Any, **options: Any) -> Callable:
    """`forward_step` whose model computes `loss` instead of cross-entropy.

    forward_step(..., model, ...) -> (output, loss_func), as megatron-core's schedules call it: it passes labels and loss_mask to the model, and
      its loss_func sums output x loss_mask.  The signature stays, whichever of Megatron-LM's and Megatron-Bridge's it is.
    loss, options: what `attach` takes; every model chunk that comes by is attached to once, at its first forward.

    Two-pass, the forward_step's own loss_func runs on, with its normalisation, and nll, token_prob, entropy, weight, ... are added to what it
    reports.  With one_pass=True the plugin's takes its place.  `.detach()` of what is returned gives the models back as they were.
    ValueError for a forward_step without a parameter called `model`, or that is asked for a schedule plan; RuntimeError when it passes no labels.
    """
    signature = inspect.signature(forward_step)
    if "model" not in signature.parameters:
        raise ValueError(f"got forward_step{signature}, expected a parameter called 'model': that is what the loss is attached to")
    handles: dict[torch.nn.Module, Handle] = {}

    @functools.wraps(forward_step)
    def step(*args: Any, **kwargs: Any) -> tuple[Any, Callable]:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("return_schedule_plan"):
            raise ValueError(
                "got return_schedule_plan=True (overlap_moe_expert_parallel_comm), expected False: such a schedule runs the model piece by "
                "piece, past the attached loss; switch it off, or attach yourself and, on megatron-core 0.18 and later, give "
                "build_schedule_plan output_processor=handle.output_processor"
            )
        model = given["model"]
        if model not in handles:
            handles[model] = attach(model, loss, **options)
        handle = handles[model]
        handle.output = None
        output, loss_func = forward_step(*args, **kwargs)
        if not handle.active:
            return output, loss_func
        if handle.output is None:
            raise RuntimeError(
                f"forward_step{signature} did not call its model with labels, so the attached loss had no part in what it returned: pass labels=, "
                "or form the loss from its logits with megatron_plugin.token_loss"
            )
        return output, handle.loss_func if handle.one_pass else functools.partial(_reporting, loss_func, handle)

    def detach() -> None:
        while handles:
            handles.popitem()[1].detach()

    step.detach = detach  # type: ignore[attr-defined]
    return step


def _reporting(loss_func: Callable, handle: Handle, output: Tensor, **options: Any) -> Any:
    """What `loss_func` returns, its report completed by our metrics as [sum, tokens] pairs."""
    returned = loss_func(output, **options)
    if handle.output is None or not (isinstance(returned, tuple) and isinstance(returned[-1], dict)):
        return returned  # non-loss data
    return *returned[:-1], metric_pairs(handle.output) | returned[-1]
