"""The same objectives as most trainers write them, in plain PyTorch: eager, and compiled.  T tokens, H hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_plugin.bench.cases import IGNORE, LinearCase, LogitsCase, objective_sum
from megatron_plugin.bench.harness import Run


def compiled(function: Callable) -> Callable:
    """For one static shape; the report resets the compiler between shapes, so no recompilation limit is met."""
    return torch.compile(function, dynamic=False)


def in_place(case: LogitsCase):
    """prepare: fresh logits, since the rival may write over them."""

    def prepare():
        case.restore()
        return case.leaf()

    return prepare


def stats_log_softmax(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logp, entropy) as most trainers write them."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    logp = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    live = labels != IGNORE
    return torch.where(live, logp, 0.0), torch.where(live, -(log_p.exp() * log_p).sum(-1), 0.0)


def stats_lse(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logp, entropy) in the form with the fewest passes: lse - sum(p z)."""
    z = logits.float() / temperature
    lse = z.logsumexp(-1)
    logp = z.gather(-1, labels.clamp(min=0)[:, None])[:, 0] - lse
    entropy = lse - (torch.exp(z - lse[:, None]) * z).sum(-1)
    live = labels != IGNORE
    return torch.where(live, logp, 0.0), torch.where(live, entropy, 0.0)


def stats_in_one_expression(function: Callable, compile: bool = False):
    def build(case: LogitsCase) -> Run:
        run = compiled(function) if compile else function

        @torch.no_grad()
        def call(_):
            logp, entropy = run(case.logits, case.labels, case.shape.temperature)
            return {"logp": logp, "entropy": entropy}

        return Run(call)

    return build


def expression(objective: str, function: Callable, compile: bool = False):
    """Autograd through one of the expressions above."""

    def build(case: LogitsCase) -> Run:
        def forward(logits, labels, live):
            return objective_sum(objective, *function(logits, labels, case.shape.temperature), live)

        run = compiled(forward) if compile else forward

        def call(logits):
            loss = run(logits, case.labels, case.live)
            return {f"loss:{objective}": loss, f"dlogits:{objective}": torch.autograd.grad(loss, logits)[0]}

        return Run(call, in_place(case))

    return build


def gradients(case: LinearCase, objective: str, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """loss_of(hidden, weight) -> differentiable scalar."""

    def call(leaves):
        hidden, weight = leaves
        loss = loss_of(hidden, weight)
        d_hidden, d_weight = torch.autograd.grad(loss, leaves)
        return {f"loss:{objective}": loss, f"dhidden:{objective}": d_hidden, f"dweight:{objective}": d_weight}

    return Run(call, case.leaves)


def full_logits(objective: str, function: Callable, compile: bool = False):
    """The head and the loss as most trainers write them: logits [T, V] in memory, autograd for the rest."""

    def build(case: LinearCase) -> Run:
        def forward(hidden, weight, labels, live):
            return objective_sum(objective, *function(hidden @ weight.t(), labels, case.shape.temperature), live)

        run = compiled(forward) if compile else forward
        return gradients(case, objective, lambda hidden, weight: run(hidden, weight, case.labels, case.live))

    return build
