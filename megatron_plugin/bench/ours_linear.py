"""This project's hidden-in ops as contenders.  T tokens, H hidden, V vocabulary."""

from __future__ import annotations

import torch

from megatron_plugin.bench.cases import LinearCase, objective_sum
from megatron_plugin.bench.harness import Contender, Run
from megatron_plugin.bench.ours import bound, with_backend
from megatron_plugin.bench.shape import ITEMSIZE


def one_pass(objective: str, *, backend: str = "auto", **plan):
    """linear_token_loss: the gradient is formed in the forward."""

    def build(case: LinearCase) -> Run:
        from megatron_plugin import Head, Plan, linear_token_loss

        loss = bound(objective)

        def call(leaves):
            hidden, weight = leaves
            head = Head(temperature=case.shape.temperature)
            out = linear_token_loss(hidden, weight, case.labels, loss, head=head, plan=Plan(**plan))
            d_hidden, d_weight = torch.autograd.grad(out.loss_sum, leaves)
            return {f"loss:{objective}": out.loss_sum, f"dhidden:{objective}": d_hidden, f"dweight:{objective}": d_weight}

        return with_backend(backend, Run(call, case.leaves))

    return build


def one_pass_main_grad(objective: str, **plan):
    """The same with dW accumulated in fp32 straight into Megatron's main_grad, which is there before the step and is no extra memory."""

    def build(case: LinearCase) -> Run:
        from megatron_plugin import Head, MainGrad, Plan, linear_token_loss

        loss = bound(objective)
        weight = torch.nn.Parameter(case.weight)
        weight.main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        main_grad = MainGrad(weight)

        def prepare():
            main_grad.finalize()
            weight.main_grad.zero_()
            weight.grad = None
            return case.hidden.detach().requires_grad_()

        def call(hidden):
            head = Head(temperature=case.shape.temperature)
            out = linear_token_loss(hidden, weight, case.labels, loss, head=head, plan=Plan(main_grad=main_grad, **plan))
            out.loss_sum.backward()
            return {f"loss:{objective}": out.loss_sum, f"dhidden:{objective}": hidden.grad, f"dweight:{objective}": weight.main_grad}

        return Run(call, prepare)

    return build


def two_pass(objective: str, **plan):
    """linear_token_stats, the loss in plain PyTorch; logits are computed again in the backward."""

    def build(case: LinearCase) -> Run:
        from megatron_plugin import Head, Plan, linear_token_stats

        def call(leaves):
            hidden, weight = leaves
            out = linear_token_stats(hidden, weight, case.labels, head=Head(temperature=case.shape.temperature), plan=Plan(**plan))
            loss = objective_sum(objective, out.logp, out.entropy, case.live)
            d_hidden, d_weight = torch.autograd.grad(loss, leaves)
            return {f"loss:{objective}": loss, f"dhidden:{objective}": d_hidden, f"dweight:{objective}": d_weight}

        return Run(call, case.leaves)

    return build


def chunk_and_d_hidden(shape, device: str) -> int:
    """Bytes of the default chunk's logits (their gradient takes their place) and of dX: what the memory target allows."""
    from megatron_plugin.kernels.chunks import chunk_size

    itemsize = ITEMSIZE[shape.dtype]
    return chunk_size(shape.T, shape.V * itemsize, device) * shape.V * itemsize + shape.T * shape.H * itemsize


CONTENDERS = [
    Contender("ours.linear_token_loss", one_pass("dft+entropy")),
    Contender("ours.linear_token_loss chord_phi", one_pass("chord_phi+entropy")),
    Contender("ours.linear_token_loss main_grad", one_pass_main_grad("dft+entropy"), "dW in fp32 into main_grad"),
    Contender("ours.linear_token_stats", two_pass("dft+entropy"), "two-pass"),
]
ON_GPU = [
    Contender("ours.linear_token_loss fp32 logits", one_pass("dft+entropy", logits_dtype=torch.float32), "chunk logits in fp32"),
    Contender("ours.linear_token_loss (cluster)", one_pass("dft+entropy", backend="cluster"), "cluster kernel on the chunk"),
]


def contenders(shape, device: str) -> list[Contender]:
    """The forms a user chooses from; some only where the rivals run."""
    mine = [c for c in CONTENDERS if shape.rivals or device == "cuda" or not c.name.endswith("chord_phi")]
    return mine + (ON_GPU if shape.rivals and device == "cuda" else [])
