"""Switch a loss on in somebody else's model, and off again.

    handle = attach(model, "chord_phi", head=Head(vocab_size=151_643))
    per_token = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)     # [b, s], as megatron-core's own loss_funcs expect

    handle = attach(model, "chord_phi", one_pass=True, head=...)                                     # with the plugin's loss_func and normaliser
    with handle.inputs(TokenInputs(coefficient=...)):
        output = model(tokens, position_ids, attention_mask, labels=labels)
    return output, handle.loss_func

b sequences of a micro-batch, s tokens of a sequence (this rank's part of it under context parallelism).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from megatron_plugin.hooks.attach_checks import check_attachable
from megatron_plugin.hooks.books import Books
from megatron_plugin.hooks.forward_step import masked_inputs
from megatron_plugin.hooks.gpt_model import HeadSurgery, Seen, head_of
from megatron_plugin.hooks.head_loss import PLAIN, HeadLoss, Tokens
from megatron_plugin.hooks.report import check_normalised_per_step, check_will_be_divided, report
from megatron_plugin.kernels.main_grad import MainGrad
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenLoss
from megatron_plugin.losses.reduction import LossOutput
from megatron_plugin.ops import Head, Plan, TensorParallel

__all__ = ["Handle", "attach"]

log = logging.getLogger("megatron_plugin")


def attach(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    loss: str | Callable | TokenLoss,
    *,
    head: Head | None = None,
    plan: Plan | None = None,
    one_pass: bool = False,
    main_grad: bool | None = None,
    **params: float | str | Tensor,
) -> Handle:
    """Let a GPTModel form `loss` from its hidden states whenever it is called with labels.  Its logits are then never made.

    model: megatron-core's GPTModel, bare or inside DistributedDataParallel and Float16Module, or a list of virtual pipeline chunks; parameters and
      checkpoint keys stay as they are.  On a pipeline stage without the head nothing is touched, and the handle says so.
    loss, params: a name in LOSSES, a dotted path, a function, or what `bind` returned, and its parameters.
    head: vocab_size (the true vocabulary: without it Megatron's padding columns count, as in megatron-core's own loss), temperature, softcap.
      The head's bias is the model's.
    plan: how the op computes (chunks, logits_dtype, min_weight); its main_grad and grad_scale follow from the model's configuration.
    one_pass: gradients are formed in the forward, 3 GEMMs instead of 4, and the model returns the loss sum; for the plugin's `loss_func`.
    main_grad: dW goes straight into weight.main_grad; None: where config.gradient_accumulation_fusion says so.

    Two-pass, the default: the model returns coefficient x loss per token, fp32 [b, s], 0 where labels are -100, loss_mask is 0 or the
    coefficient is; right for any upstream gradient.  A loss_mask given to the model only masks there, because megatron-core's loss_funcs
    multiply by it themselves.  Called without labels the model returns logits as before.  MTP heads get plain cross-entropy.

    ValueError: an unknown loss or parameter; a model that has a loss attached already; a head that is not hidden x weight (LoRA, FP8, an
    own forward) or whose gradient is deferred; one_pass without calculate_per_token_loss.
    """
    bound, head, plan = bind(loss, **params), Head() if head is None else head, Plan() if plan is None else plan
    chunks: list[Any] = list(model) if isinstance(model, (list, tuple, torch.nn.ModuleList)) else [model]
    if not chunks:
        raise ValueError("got an empty list of model chunks, expected a GPTModel or this rank's chunks of one")
    found = [m for m in map(head_of, chunks) if m is not None]
    if len(found) > 1:
        raise ValueError(f"got {len(found)} models with an output head, expected one model or the chunks of one; attach to each by itself")
    if found:
        check_attachable(found[0], head, plan)
        if one_pass:
            check_normalised_per_step(found[0].config)
    return Handle(found[0] if found else None, bound, head, plan, one_pass, main_grad)


class Handle:
    """A loss attached to a model."""

    def __init__(self, model: LanguageModule | None, loss: TokenLoss, head: Head, plan: Plan, one_pass: bool, main_grad: bool | None) -> None:
        self.one_pass = one_pass
        self.output: LossOutput | None = None
        """Of the last forward with labels: sums and detached per-token values, [b, s] each."""
        self._model: Any = model
        self._surgery: HeadSurgery | None = None
        self._given: tuple[TokenInputs, Tensor | None] | Literal["taken"] | None = None
        self._loss_mask: Tensor | None = None
        self._fresh = False  # the output was not yet handed to megatron-core
        self._ledger: MainGrad | None = None
        self._books: Books | None = None
        if model is None:
            log.info("attach: this pipeline stage has no output head; nothing to do here")
            return
        config = model.config
        self._main_grad = config.gradient_accumulation_fusion if main_grad is None else main_grad
        group = getattr(model.output_layer, "tp_group", None) or parallel_state.get_tensor_model_parallel_group()
        tp = TensorParallel(group if group.size() > 1 else None, model.output_layer.sequence_parallel)
        plan = replace(plan, logits_dtype=plan.logits_dtype or getattr(config, "logit_dtype", None))
        self._loss = HeadLoss(loss, config, tp, head, plan)
        self._surgery = HeadSurgery(model, self._main_loss, self._mtp_loss)

    @property
    def active(self) -> bool:
        """Whether this rank's model has a head that the loss is attached to."""
        return self._surgery is not None

    def __repr__(self) -> str:
        if not self.active:
            return "Handle(nothing attached: no output head on this pipeline stage, or detached)"
        return f"Handle({self._loss.loss.name}, {'one-pass' if self.one_pass else 'two-pass'}, {self._loss.head}, {self._loss.plan})"

    def detach(self) -> None:
        """The model as it was before `attach`.  A second call does nothing."""
        if self._surgery is not None:
            self._surgery.close()
            self._surgery = None
        self._close_books()

    def forget_step(self) -> None:
        """After a step that was given up half-way, with its gradients zeroed: its forwards will have no backward, and that is right."""
        if self._ledger is not None:
            self._ledger.reset()

    @contextlib.contextmanager
    def plain(self, *, temperature: float | None = None) -> Iterator[None]:
        """Inside, forwards form plain cross-entropy instead of the attached loss: the same statistics of each token, and no need of inputs.

        temperature: of the logits; None: that of the attached head.  Where nothing is attached it does nothing."""
        if not self.active:
            yield
            return
        attached = self._loss
        head = attached.head if temperature is None else replace(attached.head, temperature=temperature)
        self._loss = replace(attached, loss=PLAIN, head=head)
        try:
            yield
        finally:
            self._loss = attached

    @contextlib.contextmanager
    def inputs(self, inputs: TokenInputs, *, on_host: Tensor | None = None) -> Iterator[None]:
        """Per-token inputs, fields [b, s], for the one forward with labels inside.

        on_host: [b, s] host copy of the mask; its tokens of 0 enter no GEMM (on a GPU; on the CPU that is found out anyway, and a mask that
        leaves out a live token is an error, where on a GPU that token counts as masked).  The same on every tensor-parallel rank.
        RuntimeError for a second forward inside, or one without labels: inputs belong to one micro-batch."""
        if not isinstance(inputs, TokenInputs):
            raise ValueError(f"got inputs of {type(inputs).__name__}, expected TokenInputs(...) with fields of [b, s]")
        if self._model is None:
            yield
            return
        surgery = self._attached()
        if self._given is not None:
            raise RuntimeError("handle.inputs inside handle.inputs: inputs belong to one micro-batch; leave the first one before the next")
        without_labels, self._given = surgery.without_labels, (inputs, on_host)
        try:
            yield
            if self._given != "taken" and surgery.without_labels > without_labels:
                raise RuntimeError("handle.inputs was given for a forward without labels, which forms no loss; pass labels=... to the model")
        finally:
            self._given = None

    def loss_func(self, output: Tensor, *, num_tokens: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """megatron-core's loss_func for what the attached model returned: (sum, tokens of this micro-batch, {name: [sum, tokens]}).

        num_tokens: 0-d int tensor in place of the number of loss tokens, for mixture-of-experts models (parallel/README.md).
        Two-pass, a loss_mask that the model was given multiplies here.  ValueError where megatron-core would not divide by the step's tokens once."""
        self._attached()
        config = self._model.config
        check_normalised_per_step(config)
        check_will_be_divided(config)
        if not self._fresh or self.output is None:
            raise RuntimeError("loss_func was called twice for one forward, or before any: call the model with labels, then loss_func with what it returned")
        expected = () if self.one_pass else tuple(self.output.per_token.loss.shape)
        if tuple(output.shape) != expected:
            raise ValueError(f"got an output of {list(output.shape)}, expected {list(expected)}: what the attached model returned")
        self._fresh = False
        if not self.one_pass:
            output = (output if self._loss_mask is None else output * self._loss_mask).sum()
        return report(output, self.output, num_tokens=num_tokens)

    def output_processor(self, *, hidden_states, output_weight, output_layer, labels, loss_mask=None, scale_logits=None, **_) -> Tensor:
        """For `model(..., output_processor=handle.output_processor)`, megatron-core 0.18 and later: the same loss without the head's call.

        DistributedDataParallel's parameter gather hangs on that call: with overlap_param_gather use the default path."""
        if labels is None:
            raise ValueError("output_processor without labels: leave output_processor out to get logits")
        hidden = hidden_states if scale_logits is None else scale_logits(hidden_states)
        return self._main_loss(hidden, output_layer.weight if output_weight is None else output_weight, Seen(labels, loss_mask))

    def _attached(self) -> HeadSurgery:
        if self._surgery is None:
            raise RuntimeError("nothing is attached: this handle was detached, or its pipeline stage has no output head; attach anew")
        return self._surgery

    def _main_loss(self, hidden: Tensor, weight: Tensor, seen: Seen) -> Tensor:
        inputs, on_host = self._take_inputs()
        assert seen.labels is not None  # without them the surgery asks for no loss
        self._loss_mask = seen.loss_mask
        if self.one_pass:  # nobody will multiply by it later
            tokens = Tokens(seen.labels, masked_inputs(inputs, seen.loss_mask), on_host=on_host)
        else:
            tokens = Tokens(seen.labels, inputs, seen.loss_mask, on_host)
        run = self._loss.summed if self.one_pass else self._loss.per_token
        out, self.output = run(hidden, weight, self._model.output_layer.bias, tokens, self._ledger_of(weight))
        self._fresh = True
        return out

    def _mtp_loss(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return self._loss.plain(hidden, weight, self._model.output_layer.bias, labels, self._ledger_of(weight))

    def _take_inputs(self) -> tuple[TokenInputs, Tensor | None]:
        match self._given:
            case None:
                return TokenInputs(), None
            case "taken":
                raise RuntimeError("a second forward inside one handle.inputs(...): inputs belong to one micro-batch; enter it anew for each")
        given, self._given = self._given, "taken"
        return given

    def _ledger_of(self, weight: Tensor) -> MainGrad | None:
        """The books of main_grad, where it is used and there will be a backward."""
        if not (self._main_grad and torch.is_grad_enabled() and weight.requires_grad):
            return None
        if self._ledger is None or self._ledger.weight is not weight:
            self._close_books()
            self._ledger = MainGrad(weight)
        if self.one_pass:
            self._books = Books.of(self._model.config, self._books)
            if self._ledger not in self._books.ledgers:
                self._books.ledgers.append(self._ledger)
        return self._ledger

    def _close_books(self) -> None:
        if self._books is not None and self._ledger is not None:
            self._books.remove(self._ledger, self._model.config)
            self._books = None
