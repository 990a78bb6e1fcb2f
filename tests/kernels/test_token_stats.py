"""token_stats against the fp64 oracle: both backends, every kind of row, every dtype."""

import math

import pytest
import torch

from megatron_plugin import token_stats as public_token_stats
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.reference import grad_reference, token_stats_reference
from megatron_plugin.kernels.token_stats import token_stats
from tests import tolerances as tol
from tests.kernels.cases import KINDS, rows, run

GPU = torch.cuda.is_available()
BACKENDS = ("eager", "triton", *(() if torch.cuda.is_available() else ("cpp",)))  # C++ takes CPU tensors only
# 7: less than a vector; 5003: odd, one block and a tail; 50257: GPT-2, odd rows; 151936: Qwen, whole blocks; 262144: Gemma, largest in use
VOCABULARIES = (7, 5003, 50257, 151936, 262144)


def _tokens(backend: str, V: int) -> int:
    """Rows per case: the interpreter needs 2 ms per block of 4096 columns."""
    return 16 if GPU else max(2, min(8, 200_000 // V))


def _check_stats(stats, oracle):
    logp, entropy, lse = oracle
    bound = tol.LOGP_FP32 + tol.LOGP_FP32_RELATIVE * logp.abs()
    finite = logp.isfinite()
    assert torch.equal(stats.logp.isfinite(), finite)
    assert ((stats.logp.double() - logp).abs()[finite] <= bound[finite]).all(), (stats.logp.double() - logp).abs()[finite].max()
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=tol.ENTROPY_FP32, rtol=0)
    torch.testing.assert_close(stats.lse.double(), lse, atol=tol.LOGP_FP32, rtol=2.0**-23)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_values_and_gradients_match_the_oracle(backend, V, kind, device):
    T = _tokens(backend, V)
    logits, labels, grads = rows(kind, T, V), torch.randint(0, V, (T,)), torch.randn(T, 3)
    labels[-1] = 0
    stats, grad = run(backend, logits.to(device), labels.to(device), grads.to(device))
    _check_stats(stats, token_stats_reference(logits, labels))
    torch.testing.assert_close(grad.cpu().double(), grad_reference(logits, labels, grads), atol=tol.GRAD_FP32, rtol=tol.GRAD_FP32)


def _eager(logits, labels, grads):
    """What a user would write: log_softmax in the logits' dtype."""
    z = logits.detach().requires_grad_()
    logp_all = z.log_softmax(-1)
    stats = (logp_all.gather(1, labels[:, None])[:, 0], -(logp_all.exp() * logp_all).sum(-1), z.logsumexp(-1))
    (grad,) = torch.autograd.grad(stats, z, tuple(grads.to(z.dtype).unbind(1)))
    return stats, grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "rising"])
def test_half_precision_is_no_worse_than_eager_pytorch(backend, dtype, kind, device):
    T, V = 8, 5003
    logits, labels, grads = rows(kind, T, V).to(dtype), torch.randint(0, V, (T,)), torch.randn(T, 3)
    stats, grad = run(backend, logits.to(device), labels.to(device), grads.to(device))
    _check_stats(stats, token_stats_reference(logits, labels))  # fp32 exact, whatever the input dtype
    truth = grad_reference(logits, labels, grads)
    _, eager = _eager(logits, labels, grads)
    error, eager_error = ((x.cpu().double() - truth).abs() for x in (grad, eager))
    assert error.max() <= tol.EAGER_FACTOR * eager_error.max()
    assert error.mean() <= tol.EAGER_FACTOR * eager_error.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_fp64_in_fp64_out(kind):
    logits, labels, grads = rows(kind, 5, 5003).double(), torch.randint(0, 5003, (5,)), torch.randn(5, 3).double()
    labels[:] = 0  # -inf label columns are compared elsewhere
    stats, grad = run("eager", logits, labels, grads)
    assert stats.logp.dtype == grad.dtype == torch.float64
    for ours, truth in zip(stats, token_stats_reference(logits, labels), strict=True):
        torch.testing.assert_close(ours, truth, atol=tol.STATS_FP64, rtol=1e-15)
    torch.testing.assert_close(grad, grad_reference(logits, labels, grads), atol=tol.STATS_FP64, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_gradcheck_in_fp64(temperature):
    logits, labels = torch.randn(4, 11, dtype=torch.float64).mul(2).requires_grad_(), torch.tensor([0, 10, -100, 4])
    shard = Shard(0, 11, -100, temperature)
    assert torch.autograd.gradcheck(lambda z: token_stats(z, labels, shard), (logits,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V, stride, lead", [(257, 257, 0), (257, 264, 3), (4099, 4099, 5), (8200, 8203, 1)])
def test_any_stride_and_alignment(backend, dtype, V, stride, lead, device):
    """Rows that start anywhere between 16-byte boundaries, in place and not; columns of the buffer outside the rows stay untouched."""
    T, temperature, vocab_size = 5, 0.7, V - 2
    buffer = (torch.randn(lead + T * stride + 9) * 3).to(dtype).to(device)
    logits = buffer.as_strided((T, V), (stride, 1), lead)
    labels, grads = torch.randint(0, vocab_size, (T,)), torch.randn(T, 3)
    labels[2] = -100
    where = dict(vocab_size=vocab_size, temperature=temperature)
    truth = grad_reference(logits.cpu(), labels, grads, **where)
    before = buffer.clone()
    stats, grad = run(backend, logits, labels.to(device), grads.to(device), **where)
    assert torch.equal(buffer, before)
    _check_stats(stats, token_stats_reference(logits.cpu(), labels, **where))
    bound = dict(atol=2.0**-9, rtol=2.0**-8) if dtype == torch.bfloat16 else dict(atol=tol.GRAD_FP32, rtol=tol.GRAD_FP32)
    torch.testing.assert_close(grad.cpu().double(), truth, **bound)

    _, in_place = run(backend, logits, labels.to(device), grads.to(device), **where, overwrite=True)
    assert in_place.data_ptr() == logits.data_ptr()
    assert torch.equal(in_place, grad)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided((T, V), (stride, 1), lead).fill_(False)
    assert torch.equal(buffer[outside], before[outside])
    assert not grad[2].any() and not grad[:, vocab_size:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_rows_sum_to_dlse(backend, device):
    """sum_v dz_v = dF/dlse: 0 for every objective without z-loss."""
    logits, labels, grads = torch.randn(6, 5003) * 3, torch.randint(0, 5003, (6,)), torch.randn(6, 3)
    _, grad = run(backend, logits.to(device), labels.to(device), grads.to(device))
    torch.testing.assert_close(grad.cpu().double().sum(1), grads[:, 2].double(), atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_a_confident_label_keeps_its_digits(backend, dtype, device):
    """a (1 - p) for p from 0.94 to 0.99999.  Formed in bf16 as p - 1, it is 17 % off at 0.99 and 0 from 0.999 on.  DFT lives on such tokens."""
    lead = torch.tensor([8.5, 10.0, 12.0, 14.0, 17.0])
    logits, labels = torch.zeros(5, 300), torch.full((5,), 5)
    logits[:, 5] = lead
    logits = logits.to(dtype)
    grads = torch.tensor([[-1.0, 0.0, 0.0]] * 5)
    _, grad = run(backend, logits.to(device), labels.to(device), grads.to(device))
    truth = grad_reference(logits, labels, grads)
    assert truth[-1, 5].abs() < 2e-5
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(grad[:, 5].cpu().double(), truth[:, 5], atol=tol.CONFIDENT_LABEL, rtol=rounding)


def test_metric_only_use_needs_no_gradient():
    logits, labels = torch.randn(4, 50), torch.randint(0, 50, (4,))
    stats = token_stats(logits, labels, Shard(0, 50, -100, 1.0))
    assert not stats.logp.requires_grad
    with torch.no_grad():
        stats = token_stats(logits.requires_grad_(), labels, Shard(0, 50, -100, 1.0))
    assert stats.logp.grad_fn is None


def test_second_backward_after_overwriting_is_an_error():
    logits = torch.randn(4, 50, requires_grad=True)
    stats = token_stats(logits * 1.0, torch.randint(0, 50, (4,)), Shard(0, 50, -100, 1.0), overwrite_logits=True)
    stats.logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logp.sum().backward()


def test_fullgraph_compile_of_any_shape_and_temperature():
    """dynamic: sizes, vocabulary and temperature are symbols; one graph serves them all."""

    def loss(z, labels, temperature, vocab_size):
        stats = public_token_stats(z, labels, temperature=temperature, vocab_size=vocab_size)
        return -(stats.logp.detach().exp() * stats.logp).sum() - 0.01 * stats.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, V, temperature in ((6, 99, 1.0), (7, 50, 0.7), (8, 101, 1.3)):
        logits, labels = torch.randn(T, V, requires_grad=True), torch.randint(0, V - 2, (T,))
        (expected,) = torch.autograd.grad(loss(logits, labels, temperature, V - 1), logits)
        (got,) = torch.autograd.grad(compiled(logits, labels, temperature, V - 1), logits)
        torch.testing.assert_close(got, expected, atol=tol.GRAD_FP32, rtol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0, 1e-3, 3.3, 1e4])
def test_the_factor_of_the_kernels_is_rounded_as_fp32_is(temperature):
    shard, exact = Shard(0, 1, -100, temperature), math.log2(math.e) / temperature
    assert shard.scale2(torch.float32) == float(torch.tensor(exact, dtype=torch.float32)) and shard.scale2(torch.float64) == exact


def test_fullgraph_compile():
    """The op is one node to torch.compile: no graph break, same numbers."""
    logits, labels = torch.randn(6, 99, requires_grad=True), torch.randint(0, 99, (6,))

    def loss(z):
        stats = token_stats(z, labels, Shard(0, 99, -100, 1.0))
        return -(stats.logp.detach().exp() * stats.logp).sum() - 0.01 * stats.entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(logits), logits)
    (got,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(got, expected)
