"""What the backward brings to the one-pass op on logits: a loss scale that was announced, another one, one that overflowed."""

import math

import pytest
import torch

from megatron_plugin import TokenInputs, token_loss
from megatron_plugin.kernels.backend import use_backend
from megatron_plugin.kernels.scale import scale_triton
from tests import tolerances as tol
from tests.kernels.cases import rows
from tests.kernels.test_token_loss import _oracle as oracle

BACKENDS = ("eager", "triton", "auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_fp16_gradients_carry_the_loss_scale_from_the_start(backend, as_tensor, device):
    """Stored first and scaled after, most of them underflow: of size 1e-6 here, where fp16 has steps of 6e-8."""
    T, V, scale = 64, 5003, 2.0**16
    logits, labels, coefficient = rows("normal", T, V).half(), torch.randint(0, V, (T,)), torch.full((T,), 1 / T)
    _, truth = oracle("sft", logits, labels, dict(coefficient=coefficient))
    eager = logits.clone().requires_grad_()
    (torch.nn.functional.cross_entropy(eager.float(), labels, reduction="sum") / T * scale).backward()
    z = logits.to(device).requires_grad_()
    grad_scale = torch.tensor(scale, device=device) if as_tensor else scale
    with use_backend(backend):
        out = token_loss(z, labels.to(device), "sft", inputs=TokenInputs(coefficient=coefficient.to(device)), grad_scale=grad_scale)
    if as_tensor:
        grad_scale.mul_(2)  # a loss scaler moves its scale in place
    (out.loss_sum * scale).backward()
    error, rival = ((x.grad.cpu().double() / scale - truth).abs() for x in (z, eager))
    assert error.mean() <= tol.EAGER_FACTOR * rival.mean() and error.max() <= tol.EAGER_FACTOR * rival.max()


@pytest.mark.parametrize("upstream", [8.0, 3.0])
def test_another_upstream_than_grad_scale_is_right_too(upstream, device):
    logits, labels = torch.randn(5, 503), torch.randint(0, 503, (5,))
    truth, expected = oracle("dft", logits, labels, {})
    z = logits.to(device).requires_grad_()
    out = token_loss(z, labels.to(device), "dft", grad_scale=8.0)
    (out.loss_sum * upstream).backward()
    torch.testing.assert_close(out.loss_sum.detach().cpu().double(), truth.loss_sum.detach(), atol=tol.LOSS_SUM, rtol=tol.LOSS_SUM)
    torch.testing.assert_close(z.grad.cpu().double(), upstream * expected, atol=upstream * tol.GRAD_FP32, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan])
def test_a_broken_upstream_does_not_reach_masked_rows(backend, dtype, upstream, device):
    """A loss scale that overflowed: live rows show it, masked rows and padding are exactly 0."""
    if dtype == torch.float64 and backend == "triton":
        backend = "eager"  # Triton takes no fp64
    logits, labels = torch.randn(5, 303, dtype=dtype, device=device), torch.tensor([1, -100, 7, 299, -100], device=device)
    z = logits.requires_grad_()
    with use_backend(backend):
        out = token_loss(z, labels, "dft", vocab_size=300)
        (out.loss_sum * upstream).backward()
    assert not z.grad[[1, 4]].any() and not z.grad[:, 300:].any()
    assert not z.grad[[0, 2, 3], :300].isfinite().any()


@pytest.mark.parametrize("V, stride, lead", [(303, 303, 0), (4099, 4101, 5), (8192, 8192, 0)])
@pytest.mark.parametrize("factor", [math.inf, math.nan, 0.5])
def test_the_scale_kernel_keeps_zeros(V, stride, lead, factor, device):
    """Edges, body and tail of rows; the op itself asks the kernel on a GPU only."""
    x = torch.randn(lead + 4 * stride + 9, device=device).bfloat16().as_strided((4, V), (stride, 1), lead)
    x[1], x[:, 3], x[:, V - 1] = 0.0, 0.0, 0.0
    expected = torch.where(x == 0, 0.0, x * factor)
    scale_triton(x, torch.tensor(factor, device=device))
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
