"""This project's ops as contenders.  Imported lazily: a backend that is not built yet is a row that says so."""

from __future__ import annotations

import torch

from megatron_plugin.bench.cases import ENTROPY, LogitsCase, objective_sum
from megatron_plugin.bench.harness import NotMeasured, Run


def bound(objective: str):
    from megatron_plugin import bind

    name, _, entropy = objective.partition("+")
    return bind({"nll": "sft"}.get(name, name), **({"entropy_bonus": ENTROPY} if entropy else {}))


def with_backend(name: str, run: Run) -> Run:
    """The same run with a backend forced (both its parts), after a look whether it exists."""
    from megatron_plugin.kernels.backend import BACKENDS, use_backend

    if name not in BACKENDS:
        raise NotMeasured(f"no backend '{name}' here")

    def forced(function):
        def call(*arguments):
            with use_backend(name):
                return function(*arguments)

        return call

    return Run(forced(run.call), forced(run.prepare))


def stats(backend: str = "auto"):
    """token_stats without gradient: logp, entropy and lse from one read."""

    def build(case: LogitsCase) -> Run:
        from megatron_plugin import token_stats

        def call(_):
            out = token_stats(case.logits, case.labels, temperature=case.shape.temperature)
            return {"logp": out.logp, "entropy": out.entropy, "lse": out.lse}

        return with_backend(backend, Run(call))

    return build


def two_pass(objective: str, backend: str = "auto"):
    """token_stats, the loss in plain PyTorch, the gradient written over the logits in the backward."""

    def build(case: LogitsCase) -> Run:
        from megatron_plugin import token_stats

        def call(logits):
            out = token_stats(logits, case.labels, temperature=case.shape.temperature, overwrite_logits=True)
            loss = objective_sum(objective, out.logp, out.entropy, case.live)
            (dlogits,) = torch.autograd.grad(loss, logits)
            return {f"loss:{objective}": loss, f"dlogits:{objective}": dlogits, "entropy": out.entropy}

        return with_backend(backend, Run(call, _fresh(case)))

    return build


def one_pass(objective: str, backend: str = "auto"):
    """token_loss: weights, loss, metrics and the gradient over the logits."""

    def build(case: LogitsCase) -> Run:
        from megatron_plugin import token_loss

        loss = bound(objective)

        def call(logits):
            out = token_loss(logits, case.labels, loss, temperature=case.shape.temperature, overwrite_logits=True)
            (dlogits,) = torch.autograd.grad(out.loss_sum, logits)
            return {f"loss:{objective}": out.loss_sum, f"dlogits:{objective}": dlogits, "entropy": out.per_token.entropy}

        return with_backend(backend, Run(call, _fresh(case)))

    return build


def grad_in_place(objective: str, backend: str = "auto"):
    """The backward of token_stats alone; its forward is not timed."""

    def build(case: LogitsCase) -> Run:
        from megatron_plugin import token_stats

        def prepare():
            logits = _fresh(case)()
            out = token_stats(logits, case.labels, temperature=case.shape.temperature, overwrite_logits=True)
            return objective_sum(objective, out.logp, out.entropy, case.live), logits

        def call(state):
            loss, logits = state
            return {f"dlogits:{objective}": torch.autograd.grad(loss, logits)[0]}

        return with_backend(backend, Run(call, prepare))

    return build


def _fresh(case: LogitsCase):
    def prepare():
        case.restore()
        return case.leaf()

    return prepare
