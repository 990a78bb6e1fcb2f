"""Rows of the head behind the true vocabulary (Megatron's padding) may hold anything: no value and no gradient is theirs."""

import math

import pytest
import torch

from megatron_plugin import Head, MainGrad, Plan, bind, linear_token_loss
from megatron_plugin.kernels import head as kernel_head
from megatron_plugin.kernels import shard_ops
from megatron_plugin.kernels.backend import use_backend
from megatron_plugin.kernels.chunks import plan_chunks
from megatron_plugin.kernels.exchange import Exchange
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.linear_token_loss import linear_token_loss_table
from megatron_plugin.kernels.linear_token_stats import linear_token_stats
from megatron_plugin.kernels.objective import COLUMNS
from megatron_plugin.kernels.sweep import Sweep
from megatron_plugin.losses.contract import TokenInputs
from megatron_plugin.losses.objective import objective_of
from tests import tolerances as tol
from tests.kernels.linear_oracle import GemmFlop, dense, distance, problem
from tests.kernels.test_linear_token_loss import DTYPES, one_pass, two_pass

V, REAL = 101, 97  # a multiple of nothing
BACKENDS = ("eager", "triton", *(() if torch.cuda.is_available() else ("cpp",)))  # C++ takes CPU tensors only


@pytest.fixture(params=[1, 8], ids=["exact", "gpu-width"])
def align(request, monkeypatch):
    """How wide the GEMMs are: the real columns, or 16 bytes more (a GPU), where some of the padding takes part."""
    monkeypatch.setattr(kernel_head, "ALIGN", {"cpu": request.param, "cuda": request.param})
    return request.param


@pytest.mark.parametrize("way", [one_pass, two_pass])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, dict(bias=True), dict(softcap=3.0), dict(bias=True, softcap=3.0)], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_in_the_padding_reaches_nothing(way, dtype, options, poison, align, device):
    hidden, weight, labels, inputs = problem(40, V=V, dtype=dtype)
    labels, bias = labels.clamp(max=REAL - 1), torch.linspace(-1, 1, V).to(dtype) if "bias" in options else None
    head = Head(bias, options.get("softcap"), vocab_size=REAL)
    weight[REAL:] = 0.0
    clean, clean_grads = way(hidden, weight, labels, "idft", inputs=inputs, head=head, device=device, chunk_tokens=16)
    weight[REAL:] = poison
    if bias is not None:
        bias[REAL:] = poison
    out, grads = way(hidden, weight, labels, "idft", inputs=inputs, head=head, device=device, chunk_tokens=16)
    assert torch.equal(out.loss_sum, clean.loss_sum)
    for name, gradient in grads.items():
        assert torch.equal(gradient, clean_grads[name]), name
        assert name == "hidden" or gradient.shape[0] == V and not gradient[REAL:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("real", [2, 7, 8, 9, 96, 97, 100, 101])
def test_any_number_of_real_columns(dtype, real, align, device):
    """Fewer than the GEMM's granule, a whole number of them, no padding at all."""
    hidden, weight, labels, inputs = problem(40, 16, V, dtype=dtype)
    labels = labels.clamp(max=real - 1)
    _, truth = dense(hidden, weight, labels, "sft", inputs=inputs, head=Head(vocab_size=real))
    _, cut = one_pass(hidden, weight[:real], labels, "sft", inputs=inputs, device=device, chunk_tokens=16)
    weight[real:] = math.nan
    _, grads = one_pass(hidden, weight, labels, "sft", inputs=inputs, head=Head(vocab_size=real), device=device, chunk_tokens=16)
    assert distance(grads["hidden"], truth["hidden"]) <= tol.PADDED_HEAD * distance(cut["hidden"], truth["hidden"])
    assert distance(grads["weight"][:real], truth["weight"][:real]) <= tol.PADDED_HEAD * distance(cut["weight"], truth["weight"][:real])
    assert not grads["weight"][real:].any()


def test_main_grad_keeps_what_it_holds_there(align, device):
    hidden, weight, labels, inputs = problem(40, V=V)
    weight[REAL:] = math.nan
    weight, hidden = torch.nn.Parameter(weight.to(device)), hidden.to(device).requires_grad_()
    weight.main_grad = torch.ones_like(weight)
    ledger = MainGrad(weight)
    plan = Plan(main_grad=ledger, chunk_tokens=16)
    out = linear_token_loss(hidden, weight, labels.clamp(max=REAL - 1).to(device), "dft", head=Head(vocab_size=REAL), plan=plan)
    out.loss_sum.backward()
    ledger.finalize()
    assert weight.main_grad.isfinite().all() and (weight.main_grad[REAL:] == 1).all() and hidden.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("one", [True, False], ids=["one-pass", "two-pass"])
def test_a_rank_with_nothing_but_padding(backend, softcap, one, device):
    """The last of the tensor-parallel ranks of a small vocabulary: it takes part in every exchange and adds exactly nothing."""
    T, here = 12, Shard(300, 300, -100, 1.0)
    labels, logits = torch.randint(0, 300, (T,), device=device), torch.randn(T, 300, device=device)
    hidden = torch.randn(T, 8, device=device, requires_grad=True)
    weight = torch.full((20, 8), math.nan, device=device, requires_grad=True)
    chunks = plan_chunks(T, 1, T, kept=None, device=hidden.device)
    with use_backend(backend):
        there = shard_ops.stats(logits, labels, 0, 300, -100, 1.0)
        sweep = Sweep(chunks, here, torch.float32, softcap, Exchange(gather_partials=lambda mine: torch.stack((there, mine))))
        if one:
            objective, own = objective_of(bind("dft"), TokenInputs())
            value, table = linear_token_loss_table(hidden, weight, None, labels, sweep, objective, len(COLUMNS) + len(own))
            logp = table[COLUMNS.index("logp")]
        else:
            logp = linear_token_stats(hidden, weight, None, labels, sweep).logp
            value = logp.sum()
        value.backward()
    torch.testing.assert_close(logp.detach(), logits.log_softmax(1).gather(1, labels[:, None])[:, 0])
    assert not hidden.grad.any() and not weight.grad.any() and weight.grad.shape == weight.shape


def test_the_padding_costs_no_arithmetic():
    hidden, weight, labels, inputs = problem(64, 8, 400)
    with GemmFlop() as counter:
        one_pass(hidden, weight, labels.clamp(max=99), "dft", inputs=TokenInputs(), head=Head(vocab_size=100))
    live = int((labels != -100).sum())
    assert counter.flop == 3 * 2 * live * 100 * 8
