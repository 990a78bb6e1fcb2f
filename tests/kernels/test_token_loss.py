"""The one-pass op: fused kernel, composed kernels and PyTorch give the terms and gradients of the two-pass form in fp64."""

import math

import pytest
import torch
import torch.utils.checkpoint
import triton
import triton.language as tl

from megatron_plugin import LOSSES, TokenInputs, TokenTerms, bind, token_loss
from megatron_plugin.kernels.backend import use_backend
from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.contract import TokenLoss
from megatron_plugin.losses.reduction import evaluate_loss
from tests import tolerances as tol
from tests.kernels.cases import rows

BACKENDS = ("eager", "triton")
# 7: less than a vector; 5003: odd, one block and a tail; 50257: GPT-2, blocks and edges on both sides
VOCABULARIES = (7, 5003, 50257)


NEED_EXTRA = {"gspo", "srft"}  # losses that read inputs.extra: tests/losses/


def _inputs(T: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    given = dict(coefficient=torch.rand(T, dtype=dtype) + 0.5, advantage=torch.randn(T, dtype=dtype), old_logp=-9 * torch.rand(T, dtype=dtype))
    return given | dict(expert=torch.arange(T) % 2 > 0)


def _oracle(loss, logits, labels, inputs, *, vocab_size=None, temperature=1.0):
    """Two-pass in fp64 on a dense log-softmax: LossOutput and the gradient of the logits."""
    V = vocab_size or logits.shape[1]
    z = logits.detach().cpu().double().requires_grad_()
    scaled = z[:, :V] / temperature
    live = labels.cpu() != -100
    logp_all = scaled.log_softmax(-1)
    logp = logp_all.gather(1, labels.cpu().clamp(min=0)[:, None])[:, 0]
    p = logp_all.exp()
    stats = TokenStats(logp, -(p * torch.where(p > 0, logp_all, 0.0)).sum(-1), scaled.logsumexp(-1))
    out = evaluate_loss(bind(loss).for_vocabulary(V), stats, TokenInputs(**{k: v.cpu().double() for k, v in inputs.items()}), live)
    (grad,) = torch.autograd.grad(out.loss_sum, z)
    return out, grad


def _check(out, grad, truth, grad_truth, *, dtype=torch.float32):
    torch.testing.assert_close(out.loss_sum.detach().cpu().double(), truth.loss_sum.detach(), atol=tol.LOSS_SUM, rtol=tol.LOSS_SUM)
    for name, column in out.per_token._asdict().items():
        torch.testing.assert_close(column.cpu().double(), getattr(truth.per_token, name), atol=tol.TERMS, rtol=tol.TERMS, msg=name)
    assert list(out.metric_sums) == list(truth.metric_sums)
    for name, value in out.metric_sums.items():
        torch.testing.assert_close(value.cpu().double(), truth.metric_sums[name].double(), atol=tol.LOSS_SUM, rtol=tol.LOSS_SUM, msg=name)
    rounding = tol.GRAD_FP32 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(grad.cpu().double(), grad_truth, atol=tol.GRAD_FP32, rtol=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", sorted(set(LOSSES) - NEED_EXTRA))
@pytest.mark.parametrize("regularised", [False, True], ids=["plain", "regularised"])
def test_every_loss_matches_the_oracle(backend, loss, regularised, device):
    T, V = 6, 5003
    logits, labels, inputs = rows("normal", T, V), torch.randint(0, V, (T,)), _inputs(T)
    labels[2], inputs["coefficient"][4] = -100, 0.0
    bound = bind(loss, **(dict(entropy_bonus=0.1, z_loss=0.01) if regularised else {}))
    truth, grad_truth = _oracle(bound, logits, labels.masked_fill(inputs["coefficient"] == 0, -100), inputs, temperature=0.7, vocab_size=V - 2)
    z = logits.to(device).requires_grad_()
    with use_backend(backend):
        given = TokenInputs(**{k: v.to(device) for k, v in inputs.items()})
        out = token_loss(z, labels.to(device), bound, inputs=given, temperature=0.7, vocab_size=V - 2)
    out.loss_sum.backward()
    assert out.num_tokens == 4
    _check(out, z.grad, truth, grad_truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("kind", ["normal", "peaked", "offset", "masked_columns", "rising"])
def test_every_kind_of_row(backend, dtype, V, kind, device):
    T = 3
    logits, labels = rows(kind, T, V).to(dtype), torch.tensor([0, V - 1, V // 2])
    labels = labels.where(logits.gather(1, labels[:, None])[:, 0].isfinite(), 0)
    loss = bind("idft", entropy_bonus=0.05)
    truth, grad_truth = _oracle(loss, logits, labels, {})
    z = logits.to(device).requires_grad_()
    with use_backend(backend):
        out = token_loss(z, labels.to(device), loss)
    out.loss_sum.backward()
    _check(out, z.grad, truth, grad_truth, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V, stride, lead", [(257, 264, 3), (4099, 4099, 5)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_any_stride_and_alignment(backend, V, stride, lead, overwrite, device):
    """In place and not; nothing outside the rows is touched, padding gets no gradient."""
    T, vocab_size = 4, V - 2
    buffer = torch.randn(lead + T * stride + 9).mul(3).to(device)
    logits, labels = buffer.as_strided((T, V), (stride, 1), lead), torch.tensor([0, vocab_size - 1, -100, 7])
    truth, grad_truth = _oracle("chord_phi", logits, labels, {}, vocab_size=vocab_size)
    before = buffer.clone()
    z = logits.detach().requires_grad_()
    with use_backend(backend):
        out = token_loss(z, labels.to(device), "chord_phi", vocab_size=vocab_size, overwrite_logits=overwrite)
    (grad,) = torch.autograd.grad(out.loss_sum, z)
    _check(out, grad, truth, grad_truth)
    assert (grad.data_ptr() == z.data_ptr()) == overwrite and not grad[2].any() and not grad[:, vocab_size:].any()
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided((T, V), (stride, 1), lead).fill_(not overwrite)
    assert torch.equal(buffer[outside], before[outside])


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_as_tensors(backend, device):
    """mu and ramps change each step: 0-d tensors, of any dtype, give what numbers give."""
    logits, labels = torch.randn(4, 300, device=device), torch.randint(0, 300, (4,), device=device)
    numbers = dict(ramp=0.25, gamma_max=1.5, entropy_bonus=0.1, z_loss=0.01)
    with use_backend(backend):
        plain = token_loss(logits, labels, bind("idft", **numbers))
        tensors = token_loss(logits, labels, bind("idft", **{k: torch.tensor(v, device=device, dtype=torch.float64) for k, v in numbers.items()}))
    torch.testing.assert_close(tensors.loss_sum, plain.loss_sum, atol=0, rtol=tol.TWIN)
    torch.testing.assert_close(tensors.metric_sums["gamma"], plain.metric_sums["gamma"], atol=0, rtol=tol.TWIN)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", [1.0, 0.125, -3.0])
def test_the_upstream_scalar_reaches_the_gradient(backend, upstream, device):
    logits, labels = torch.randn(5, 5003), torch.randint(0, 5003, (5,))
    _, expected = _oracle("dft", logits, labels, {})
    z = logits.to(device).requires_grad_()
    with use_backend(backend):
        (token_loss(z, labels.to(device), "dft").loss_sum * upstream).backward()
    torch.testing.assert_close(z.grad.cpu().double(), upstream * expected, atol=abs(upstream) * tol.GRAD_FP32, rtol=0)


def test_a_second_backward_is_an_error_that_says_what_to_do(device):
    out = token_loss(torch.randn(4, 50, device=device, requires_grad=True), torch.randint(0, 50, (4,), device=device), "dft")
    out.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through token_loss.*two-pass"):
        out.loss_sum.backward()


@pytest.mark.parametrize("loss", ["dft", "tests.test_ops.sharpened"])
def test_recomputed_activations(loss, device):
    """Under checkpointing without reentry the terms, differentiated inside the forward, must not start the recomputation there and then."""
    runs = []

    def block(x):
        runs.append(1)
        return token_loss(x * 2, labels, loss).loss_sum

    labels, x = torch.randint(0, 50, (4,), device=device), torch.randn(4, 50, device=device, requires_grad=True)
    (plain,) = torch.autograd.grad(token_loss(x * 2, labels, loss).loss_sum, x)
    for reentrant in (False, True):
        runs.clear()
        y = x.detach().requires_grad_()
        torch.utils.checkpoint.checkpoint(block, y, use_reentrant=reentrant).backward()
        assert torch.equal(y.grad, plain) and len(runs) == 2, "once forward, once again in the backward"


def test_logits_that_were_overwritten_cannot_be_used_by_another_backward(device):
    """The version counter is moved, so that autograd refuses a graph that saved the logits."""
    hidden = torch.randn(4, 50, device=device, requires_grad=True)
    logits = hidden * 1.0
    other = logits.square().sum()
    token_loss(logits, torch.randint(0, 50, (4,), device=device), "dft", overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_writes_nothing(backend, device):
    logits, labels = torch.randn(4, 300, device=device, requires_grad=True), torch.randint(0, 300, (4,), device=device)
    before = logits.detach().clone()
    with use_backend(backend), torch.no_grad():
        out = token_loss(logits, labels, "idft", overwrite_logits=True)
    assert torch.equal(logits, before) and not out.loss_sum.requires_grad
    with use_backend(backend):
        trained = token_loss(logits, labels, "idft")
    assert torch.equal(out.per_token.logp, trained.per_token.logp)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_masked_row_beats_every_check(backend, poison, device):
    """By label or by coefficient 0, with NaN logits and NaN inputs."""
    logits, labels, inputs = torch.randn(5, 300), torch.randint(0, 300, (5,)), _inputs(5)
    logits[1], labels[1], inputs["advantage"][1] = poison, -100, poison
    logits[3], inputs["coefficient"][3], inputs["old_logp"][3] = poison, 0.0, poison
    z = logits.to(device).requires_grad_()
    with use_backend(backend):
        out = token_loss(z, labels.to(device), "grpo", inputs=TokenInputs(**{k: v.to(device) for k, v in inputs.items()}))
    out.loss_sum.backward()
    assert out.loss_sum.isfinite() and out.num_tokens == 3 and z.grad.isfinite().all() and not z.grad[[1, 3]].any()
    assert all(not column[[1, 3]].any() for column in out.per_token) and all(v.isfinite() for v in out.metric_sums.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["luffy", "grpo"])
def test_nan_in_a_live_row_is_never_hidden(backend, loss, device):
    """Not even by a clip, whose derivative is 0 there."""
    logits, labels = torch.randn(3, 5003, device=device), torch.tensor([7, 7, 7], device=device)
    logits[1, 4000] = math.nan
    z = logits.requires_grad_()
    with use_backend(backend):
        out = token_loss(z, labels, loss, inputs=TokenInputs(advantage=torch.ones(3, device=device), old_logp=-torch.ones(3, device=device)))
    out.loss_sum.backward()
    assert out.loss_sum.isnan() and out.per_token.loss.isnan().tolist() == [False, True, False]
    assert z.grad[1].isnan().any() and z.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_range_of_the_logits_in_one_pass(backend, device):
    """From 2^31 ln 2 = 1.49e9 on a row is NaN, and no other row."""
    logits, labels = torch.randn(4, 300, device=device), torch.tensor([5, 6, -100, 8], device=device)
    logits[1:3] = 4e9
    z = logits.requires_grad_()
    with use_backend(backend):
        out = token_loss(z, labels, "eaft")
    out.loss_sum.backward()
    assert out.per_token.loss.isnan().tolist() == out.per_token.entropy.isnan().tolist() == [False, True, False, False]
    assert z.grad[1].isnan().all() and z.grad[[0, 2, 3]].isfinite().all() and not z.grad[2].any()


@pytest.mark.parametrize("loss", ["luffy", "grpo", "srft_demo"])
def test_a_stray_label_is_nan_in_the_kernel(loss, device):
    """Where nothing can raise without stalling the queue: losses that only see p must not swallow it."""
    from megatron_plugin.kernels.layout import Shard
    from megatron_plugin.kernels.loss import loss_triton
    from megatron_plugin.losses.objective import objective_of

    logits, labels = torch.randn(3, 300, device=device), torch.tensor([5, 300, -1], device=device)
    inputs = TokenInputs(advantage=torch.ones(3, device=device), old_logp=-torch.ones(3, device=device))
    table = loss_triton(logits, logits, labels, Shard(0, 300, -100, 1.0), objective_of(bind(loss), inputs)[0])
    assert table[0].isnan().tolist() == [False, True, True] and logits[0].isfinite().all() and logits[1:].isnan().any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [0, 1])
def test_no_tokens_and_one_token(backend, T, device):
    z = torch.randn(T, 77, device=device, requires_grad=True)
    with use_backend(backend):
        out = token_loss(z, torch.zeros(T, dtype=torch.int64, device=device), "idft")
    out.loss_sum.backward()
    assert out.num_tokens == T and z.grad.shape == (T, 77) and out.per_token.logp.shape == (T,) and (T or out.loss_sum == 0)


def test_a_missing_input_is_an_error_with_a_twin_too(device):
    with pytest.raises(ValueError, match="loss 'grpo' needs inputs.advantage"):
        token_loss(torch.randn(3, 50, device=device), torch.zeros(3, dtype=torch.int64, device=device), "grpo")


def quartic(stats, inputs, *, scale=2.0):
    """A user's own loss, -sg(scale p^4) log p ..."""
    weight = scale * (4 * stats.logp.detach()).exp()
    return TokenTerms(loss=-weight * stats.logp, weight=weight, metrics={"quartic": weight})


@triton.jit
def quartic_twin(logp, H, lse, coef, adv, old, roll, ref, expert, scale, p1, p2, p3, p4, p5, p6, p7):
    weight = scale * tl.exp(4 * logp)
    return -weight * logp, -weight, 0.0, 0.0, weight, weight


def test_a_users_own_twin_in_three_lines(device):
    """... and the same inside the kernel: the twin, TokenLoss(fn, twin=...), bind."""
    logits, labels = torch.randn(4, 300), torch.randint(0, 300, (4,))
    loss = bind(TokenLoss(quartic, twin=quartic_twin), scale=3.0)
    assert loss.token_local
    truth, grad_truth = _oracle(bind(quartic, scale=3.0), logits, labels, {})
    z = logits.to(device).requires_grad_()
    with use_backend("triton"):
        out = token_loss(z, labels.to(device), loss)
    out.loss_sum.backward()
    _check(out, z.grad, truth, grad_truth)


def test_a_loss_that_is_not_token_local_takes_two_passes():
    """Same op, same contract: its gradient waits for the other tokens."""
    from tests.losses.user_losses import over_batch_mean

    z, labels = torch.randn(6, 40, requires_grad=True), torch.randint(0, 40, (6,))
    out = token_loss(z, labels, over_batch_mean)
    truth, grad_truth = _oracle(over_batch_mean, z, labels, {})
    (grad,) = torch.autograd.grad(out.loss_sum, z)
    assert not bind(over_batch_mean).token_local
    _check(out, grad, truth, grad_truth)
