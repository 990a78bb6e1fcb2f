"""What a loss cannot be attached to, said before anything is touched."""

from __future__ import annotations

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_plugin.ops import Head, Plan

__all__ = ["check_attachable"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_attachable(model: LanguageModule, head: Head, plan: Plan) -> None:
    """ValueError where the model's head is not softmax(scale x (hidden x weight + bias)), or where an option is not the caller's to set."""
    for name, option, kind in (("head", head, Head), ("plan", plan, Plan)):
        if not isinstance(option, kind):
            raise ValueError(f"got {name} of {type(option).__name__}, expected {kind.__name__}(...) of megatron_plugin")
    layer, config = model.output_layer, model.config
    if type(layer).forward is not ColumnParallelLinear.forward and head.softcap is None:
        raise ValueError(
            f"the output layer {type(layer).__name__} has a forward of its own, and the loss would pass it by: if all it adds is a soft cap, say so "
            "with head=Head(softcap=...); otherwise pass logits to token_loss"
        )
    if "forward" in vars(layer):
        raise ValueError("the output layer's forward was replaced on the instance, and the loss would never be asked: undo that before attach")
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else layer.weight
    if type(weight.detach()) is not torch.Tensor or weight.dtype not in FLOATS:
        raise ValueError(
            f"the head's weight is a {type(weight.detach()).__name__} of {weight.dtype}, expected a plain fp32, bf16 or fp16 tensor: keep the output layer "
            "out of FP8 (megatron-core's own recipes do)"
        )
    if head.bias is not None:
        raise ValueError("head.bias was given, but attach takes the bias of the model's own output layer; leave it out")
    if plan.main_grad is not None or plan.rows is not None:
        raise ValueError("plan.main_grad and plan.rows change with the step: use attach(..., main_grad=True) and handle.inputs(..., on_host=mask)")
    if config.defer_embedding_wgrad_compute:
        raise ValueError("got config.defer_embedding_wgrad_compute=True, expected False: the head's weight gradient is formed with its loss")
    if getattr(config, "use_mup", False) and (layer.bias is not None or head.softcap is not None):
        raise ValueError("got config.use_mup=True with a head bias or soft cap, expected neither: MuP's factor is applied to the hidden states")
    size = layer.output_size
    if head.vocab_size is not None and not (isinstance(head.vocab_size, int) and 0 < head.vocab_size <= size):
        raise ValueError(f"got head.vocab_size={head.vocab_size!r}, expected 1 to {size}, the columns of the model's head")
