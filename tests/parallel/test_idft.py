"""IDFT against its published formula in fp64, written out here: through the hidden-in one-pass op, on one rank and split over two."""

import pytest
import torch
from torch import Tensor

from megatron_plugin import TokenInputs, bind, linear_token_loss
from tests import tolerances as tol
from tests.spawn import on_ranks

T, H, V = 48, 16, 96
CASES = {
    "the released defaults": dict(beta=1.0, gamma_min=0.1, gamma_max=2.0, ramp=1.0),
    "half-way up the ramp": dict(beta=0.7, gamma_min=0.3, gamma_max=1.5, ramp=0.5),
    "gamma_max of the 1.5B run": dict(beta=1.0, gamma_min=0.1, gamma_max=1.0, ramp=1.0),
    "the ramp not begun": dict(beta=1.0, gamma_min=0.1, gamma_max=2.0, ramp=0.0),
}


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [V, H], labels [T], mask [T]: some labels likely, most not, so that both bounds of gamma are met."""
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(V, H, generator=g)
    labels = torch.randint(V, (T,), generator=g)
    towards = torch.linspace(-0.4, 0.6, T)[:, None]
    return torch.randn(T, H, generator=g) * 0.5 + towards * weight[labels], weight, labels, (torch.arange(T) % 5 > 0).float()


def published(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, *, beta, gamma_min, gamma_max, ramp):
    """(loss sum, gamma [T], gradients of hidden and weight) in fp64: the weight a constant, everything else autograd's."""
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    log_p = (h @ w.t()).log_softmax(-1)
    logp = log_p.gather(-1, labels[:, None])[:, 0]
    phi = (logp - (log_p.exp() * log_p).sum(-1)).detach()
    gamma = 1 + ramp * (torch.clamp(torch.exp(-phi / beta), gamma_min, gamma_max) - 1)
    loss = (-(logp.exp() ** gamma).detach() * logp * mask).sum()
    return loss.detach(), gamma, *torch.autograd.grad(loss, (h, w))


def close(got: Tensor, truth: Tensor) -> None:
    assert (got.double() - truth).norm() <= tol.LINEAR_GRAD * truth.norm()


@pytest.mark.parametrize("case", CASES)
def test_the_one_pass_op_is_the_published_formula(case):
    hidden, weight, labels, mask = problem()
    loss, gamma, dh, dw = published(hidden, weight, labels, mask, **CASES[case])
    if case == "half-way up the ramp":
        assert gamma.min() == pytest.approx(1 + 0.5 * (0.3 - 1)) and gamma.max() == pytest.approx(1 + 0.5 * (1.5 - 1)), "both bounds are to be met"
    ramp = torch.tensor(0.123)
    bound = bind("idft", **CASES[case] | {"ramp": ramp})
    ramp.fill_(CASES[case]["ramp"])  # as the trainer does before each step, on what was bound once
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_token_loss(h, w, labels, bound, inputs=TokenInputs(coefficient=mask))
    out.loss_sum.backward()
    torch.testing.assert_close(out.loss_sum.detach().double(), loss, atol=0, rtol=tol.LINEAR_GRAD)
    torch.testing.assert_close(out.metric_sums["gamma"].double(), (gamma * mask).sum(), atol=0, rtol=tol.LINEAR_GRAD)
    close(h.grad, dh)
    close(w.grad, dw)


def test_ramp_0_is_dft_to_the_bit_and_gamma_bounds_of_1_too():
    hidden, weight, labels, mask = problem()
    grads = []
    for loss in (bind("dft"), bind("idft", ramp=torch.zeros(())), bind("idft", gamma_min=1.0, gamma_max=1.0)):
        h = hidden.clone().requires_grad_()
        linear_token_loss(h, weight, labels, loss, inputs=TokenInputs(coefficient=mask)).loss_sum.backward()
        grads.append(h.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2+SP"])
@pytest.mark.parametrize("case", ["half-way up the ramp", "gamma_max of the 1.5B run"])
def test_split_over_two_ranks(case, sequence_parallel):
    hidden, weight, labels, mask = problem()
    loss, _, dh, dw = published(hidden, weight, labels, mask, **CASES[case])
    call = dict(hidden=hidden.view(12, 4, H), weight=weight, labels=labels.view(12, 4), inputs={"coefficient": mask.view(12, 4)}, vocab_size=None)
    params = CASES[case] | {"ramp": torch.tensor(CASES[case]["ramp"])}
    results = on_ranks(2, "tests.parallel.linear_ranks", "gradients", **call, op="loss", loss="idft", params=params, bounds=(0, 48, 96),
                       sequence_parallel=sequence_parallel, plan=dict(chunk_tokens=10))  # fmt: skip
    for rank, (got, tokens, _, dx, dweight, _) in enumerate(results):
        assert tokens == int(mask.sum()) and torch.equal(got, results[0][0])
        torch.testing.assert_close(got.double(), loss, atol=0, rtol=tol.LINEAR_GRAD)
        close(dx, dh.view(12, 4, H).chunk(2)[rank] if sequence_parallel else dh.view(12, 4, H))
        close(dweight, dw[48 * rank : 48 * (rank + 1)])
