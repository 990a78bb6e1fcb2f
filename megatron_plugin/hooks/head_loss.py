"""The loss at a GPT's output head: hidden states and head weight in, one weighted loss per token or their sum out, in Megatron's layout.

s tokens of a sequence (s/tp of them on this rank under sequence parallelism), b sequences, h hidden, V/tp rows of the head's weight.
megatron-core keeps activations [s, b, h] and batches [b, s]; the ops want the labels in the order of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_plugin.hooks.report import loss_scale
from megatron_plugin.kernels.main_grad import MainGrad
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenLoss
from megatron_plugin.losses.reduction import LossOutput, PerToken, evaluate_tokens
from megatron_plugin.ops import Head, Plan, TensorParallel, linear_token_loss, linear_token_stats
from megatron_plugin.ops.checks import checked_inputs

__all__ = ["HeadLoss", "Tokens"]

IGNORED = -100
PLAIN = bind("sft")


@dataclass(frozen=True)
class Tokens:
    """A micro-batch at the head."""

    labels: Tensor
    """[b, s] ids, already shifted."""
    inputs: TokenInputs
    """Fields of [b, s]."""
    loss_mask: Tensor | None = None
    """[b, s], 0 where a token is not trained.  Only masks: what multiplies the loss is inputs.coefficient."""
    on_host: Tensor | None = None
    """[b, s] mask on the host: tokens that are 0 in it stay out of every GEMM (Plan.rows)."""

    def check(self, rows: int, length: int) -> None:
        """ValueError unless everything is [rows, length], which transposing and flattening would hide: a value of another token."""
        if tuple(self.labels.shape) != (rows, length):
            raise ValueError(f"labels {list(self.labels.shape)} do not fit the model's hidden states: expected [b, s] = [{rows}, {length}]")
        for name, mask in (("loss_mask", self.loss_mask), ("on_host", self.on_host)):
            if mask is not None and mask.shape != self.labels.shape:
                raise ValueError(f"{name} {list(mask.shape)} does not fit labels {list(self.labels.shape)}: expected one value per label, [b, s]")
        checked_inputs(self.inputs, self.labels)

    def masked_labels(self) -> Tensor:
        """[b, s], IGNORED where loss_mask or the coefficient is 0."""
        labels = self.labels
        for mask in (self.loss_mask, self.inputs.coefficient):
            labels = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
        return labels


@dataclass(frozen=True)
class HeadLoss:
    """A loss, and everything about the head that does not change from call to call."""

    loss: TokenLoss
    config: TransformerConfig
    tp: TensorParallel
    head: Head
    """Without its bias, which is the output layer's own."""
    plan: Plan

    def per_token(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tokens, main_grad: MainGrad | None
    ) -> tuple[Tensor, LossOutput]:
        """Two-pass: coefficient x loss fp32 [b, s], right for any upstream gradient, 0 for masked tokens; and sums over the tokens."""
        return self._per_token(self.loss, hidden, weight, bias, tokens, main_grad)

    def plain(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, main_grad: MainGrad | None) -> Tensor:
        """Two-pass: -log p fp32 [b, s], what megatron-core wants of its multi-token-prediction heads."""
        head = replace(self.head, temperature=1.0, vocab_size=None)  # the loss's options are not theirs
        return replace(self, head=head)._per_token(PLAIN, hidden, weight, bias, Tokens(labels, TokenInputs()), main_grad)[0]

    def summed(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tokens, main_grad: MainGrad | None) -> tuple[Tensor, LossOutput]:
        """One-pass: sum of coefficient x loss, 0-d fp32, its gradient formed here; and sums over the tokens."""
        plan = self._plan(tokens, main_grad)
        if isinstance(plan.grad_scale, float) and plan.grad_scale == 1.0:
            plan = replace(plan, grad_scale=loss_scale(self.config, hidden.device))
        labels, inputs = self._in_order(hidden, tokens)
        head = replace(self.head, bias=bias)
        output = linear_token_loss(hidden, weight, labels, self.loss, inputs=inputs, tp=self.tp, head=head, plan=plan)
        return output.loss_sum, output._replace(per_token=_batch_first(output.per_token, labels))

    def _per_token(self, loss, hidden, weight, bias, tokens, main_grad) -> tuple[Tensor, LossOutput]:
        labels, inputs = self._in_order(hidden, tokens)
        stats = linear_token_stats(hidden, weight, labels, tp=self.tp, head=replace(self.head, bias=bias), plan=self._plan(tokens, main_grad))
        columns = weight.shape[0] * (1 if self.tp.group is None else self.tp.group.size())
        loss = loss.for_vocabulary(self.head.vocab_size or columns)
        flat = type(stats)(*(x.reshape(-1) for x in stats))
        weighted_T, output = evaluate_tokens(loss, flat, inputs.map(lambda x: x.reshape(-1)), (labels != IGNORED).reshape(-1))
        return weighted_T.view(labels.shape).t().contiguous(), output._replace(per_token=_batch_first(output.per_token, labels))

    def _plan(self, tokens: Tokens, main_grad: MainGrad | None) -> Plan:
        rows = None if tokens.on_host is None else tokens.on_host.t().reshape(-1).nonzero().view(-1)
        return replace(self.plan, rows=rows, main_grad=main_grad)

    def _in_order(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, TokenInputs]:
        """Labels and inputs [s, b], in the order of the hidden states."""
        tokens.check(hidden.shape[1], hidden.shape[0] * (self.tp.group.size() if self.tp.sequence_parallel and self.tp.group else 1))
        return tokens.masked_labels().t().contiguous(), tokens.inputs.map(lambda x: x.t().contiguous())


def _batch_first(columns: PerToken, labels_sb: Tensor) -> PerToken:
    return PerToken(*(x.view(labels_sb.shape).t() for x in columns))
