"""Surgery on one GPTModel: with labels, its head hands hidden states on and the loss is formed from them, so the logits never exist.

One of the two rooms (CONTRIBUTING.md) in which something that is not ours is replaced; it is one model object, and `close()` puts it back:

  output_layer.__class__      a subclass of its own class whose forward, in a forward with labels, returns its input.  The call still goes
                              through the module, so DistributedDataParallel's pre-hook gathers the head's parameters; parameters,
                              checkpoint keys and every other attribute stay
  compute_language_model_loss on the instance: gets those hidden states where megatron-core thinks it passes logits
  two forward hooks           so that both know the labels and masks of the forward they are in

The same on megatron-core 0.14 to 0.19.  What lies between head and loss there: MuP's _scale_logits, which scales hidden states as well as
logits (the head is linear; refused beside a bias or a softcap), and the multi-token-prediction heads, which call both functions once each
before the main head does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import multi_token_prediction
from torch import Tensor

__all__ = ["HeadSurgery", "Seen", "head_of"]

# From 0.19 on, megatron-core counts how often the MTP heads' own logits are right: there they have to exist
MTP_NEEDS_LOGITS = hasattr(multi_token_prediction, "_compute_mtp_acceptance_counts")


@dataclass
class Seen:
    """What is known inside one forward of the model."""

    labels: Tensor | None
    loss_mask: Tensor | None
    heads: int = 0
    """Calls of the output layer so far: multi-token-prediction heads first, the main head last."""
    is_mtp: bool = False
    """Whether the last of them was a multi-token-prediction head."""
    weight: Tensor | None = None
    """[V/tp, h], of the head call whose hidden states are on their way to the loss; None: logits are."""


class HeadSurgery:
    """The operation on `model`; `main_loss(hidden, weight, seen)` and `mtp_loss(hidden, weight, labels)` replace megatron-core's loss."""

    def __init__(self, model: LanguageModule, main_loss: Callable, mtp_loss: Callable) -> None:
        self.model, self.main_loss, self.mtp_loss = model, main_loss, mtp_loss
        self.seen: Seen | None = None
        self.without_labels = 0
        """Forwards of the model without labels so far."""
        self._parameters = inspect.signature(type(model).forward)
        self._stock_loss = model.compute_language_model_loss
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        self._own_loss = vars(model).get("compute_language_model_loss")  # somebody else's, on the instance
        model.compute_language_model_loss = self._loss
        head = model.output_layer
        head.__class__ = _handing_on(type(head))
        head.surgery = self

    def close(self) -> None:
        """The model as it was."""
        for hook in self._hooks:
            hook.remove()
        del self.model.compute_language_model_loss
        if self._own_loss is not None:
            self.model.compute_language_model_loss = self._own_loss
        head = self.model.output_layer
        head.__class__ = type(head).__bases__[1]
        del head.surgery

    def _begin(self, model, args: tuple, kwargs: dict) -> None:
        given = self._parameters.bind_partial(model, *args, **kwargs).arguments
        self.seen = Seen(given.get("labels"), given.get("loss_mask"))
        self.without_labels += self.seen.labels is None

    def _end(self, model, args: tuple, output) -> None:
        self.seen = None

    def takes(self, weight: Tensor) -> bool:
        """Called by the head: True when this call's hidden states go to our loss."""
        if self.seen is None:
            return False
        self.seen.heads += 1
        self.seen.is_mtp = self.seen.heads <= (self.model.config.mtp_num_layers or 0)
        ours = self.seen.labels is not None and not (self.seen.is_mtp and MTP_NEEDS_LOGITS)
        self.seen.weight = weight if ours else None
        return ours

    def _loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """What megatron-core calls with the head's output: hidden states where the head handed them on."""
        seen = self.seen
        if seen is None:
            raise RuntimeError(
                "the attached loss was called outside model.forward: a schedule that runs the model piece by piece (build_schedule_plan, "
                "overlap_moe_expert_parallel_comm) passes the hooks by; on megatron-core 0.18 and later give it output_processor=handle.output_processor"
            )
        if seen.weight is None:
            if seen.labels is not None and not seen.is_mtp:
                raise RuntimeError("the output layer's forward was passed by (is it wrapped or replaced on the instance?): the attached loss got logits")
            return self._stock_loss(labels, logits)
        if seen.is_mtp:
            return self.mtp_loss(logits, seen.weight, labels)
        return self.main_loss(logits, seen.weight, seen)


class _HandsOn:
    """Mixed into the head's own class, in front of it."""

    surgery: HeadSurgery

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        """[s, b, h] -> (the same, None) where our loss waits for it; else what the head does."""
        if self.surgery.takes(self.weight if weight is None else weight):
            return input_, None
        return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)


@cache
def _handing_on(cls: type) -> type:
    return type(f"HandsOn{cls.__name__}", (_HandsOn, cls), {"__module__": __name__})


def head_of(model: torch.nn.Module) -> LanguageModule | None:
    """The GPTModel in `model` (DDP, Float16Module or other wrappers with .module around it) if this pipeline stage has the output head.

    ValueError for what has no such head, or one that the loss cannot stand in for."""
    while not isinstance(model, LanguageModule) and hasattr(model, "module"):
        model = model.module
    if not isinstance(model, LanguageModule):
        raise ValueError(f"got a model of {type(model).__name__}, expected megatron-core's GPTModel, bare or in DDP and Float16Module, or a list of chunks")
    if not model.post_process:
        return None
    head = getattr(model, "output_layer", None)
    if isinstance(head, _HandsOn):
        raise ValueError("this model already has a loss attached; call detach() on its handle first")
    if not isinstance(head, ColumnParallelLinear):
        raise ValueError(
            f"the output layer is a {type(head).__name__}, expected megatron-core's ColumnParallelLinear: a head with an adapter (LoRA) around it "
            "computes something else than hidden x weight; leave the head out of the adapter's target modules, or pass logits to token_loss"
        )
    return model
