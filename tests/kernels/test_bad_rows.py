"""Rows and shapes that must give the right answer or a clear error: masked, NaN, infinite, empty, huge."""

import math

import pytest
import torch

from megatron_plugin.kernels import shard_ops
from megatron_plugin.kernels.backend import use_backend
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.partials import finish_rows, merge_partials
from megatron_plugin.kernels.reference import token_stats_reference
from megatron_plugin.kernels.token_stats import token_stats
from tests import tolerances as tol
from tests.kernels.cases import run

BACKENDS = ("eager", "triton", *(() if torch.cuda.is_available() else ("cpp",)))  # C++ takes CPU tensors only
ONES = torch.ones(4, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_masked_row_beats_every_check(backend, poison, device):
    logits, labels = torch.randn(4, 5003), torch.randint(0, 5003, (4,))
    logits[1], labels[1] = poison, -100
    stats, grad = run(backend, logits.to(device), labels.to(device), ONES.to(device))
    for x in stats:
        assert x[1] == 0 and x.isfinite().all()
    assert not grad[1].any() and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_upstream_gradient_gets_none_even_with_nan_logits(backend, device):
    logits, labels, grads = torch.randn(4, 300), torch.randint(0, 300, (4,)), torch.randn(4, 3)
    logits[2], grads[2] = math.nan, 0.0
    _, grad = run(backend, logits.to(device), labels.to(device), grads.to(device))
    assert not grad[2].any() and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("column", [0, 2, 4000, 5002])  # edge before the body, body, past the first block, edge behind
def test_one_nan_in_a_live_row_is_never_hidden(backend, column, device):
    """GPU max drops NaN: a kernel that relies on it would train on a finite wrong number."""
    logits, labels = torch.randn(4, 5003), torch.tensor([7, 7, 7, 7])
    logits[1, column] = math.nan
    stats, grad = run(backend, logits.to(device), labels.to(device), ONES.to(device))
    assert stats.logp[1].isnan() and stats.entropy[1].isnan() and grad[1].isnan().any()
    assert stats.logp[[0, 2, 3]].isfinite().all() and grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_at_minus_infinity_is_minus_infinity(backend, device):
    logits, labels = torch.randn(4, 300), torch.tensor([5, 5, 5, 5])
    logits[0, 5] = -math.inf
    grads = torch.zeros(4, 3)
    grads[:, 0] = -1.0
    stats, grad = run(backend, logits.to(device), labels.to(device), grads.to(device))
    assert stats.logp[0] == -math.inf and stats.entropy.isfinite().all()
    expected = logits[0].softmax(0)
    expected[5] = -1.0  # as F.cross_entropy: softmax - onehot
    torch.testing.assert_close(grad[0].cpu(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_minus_infinity_is_nan(backend, device):
    logits = torch.randn(4, 300)
    logits[3] = -math.inf
    stats, _ = run(backend, logits.to(device), torch.tensor([5, 5, 5, 5]).to(device), ONES.to(device))
    assert stats.logp[3].isnan() and stats.logp[:3].isfinite().all()


def test_stray_labels_raise_on_the_cpu():
    shard = Shard(0, 300, -100, 1.0)
    for stray in (300, -1, 10**9):
        with pytest.raises(ValueError, match=rf"label {stray} at row 2 is outside the vocabulary \[0, 300\)"):
            token_stats(torch.randn(4, 300), torch.tensor([0, 1, stray, 2]), shard)


def test_stray_labels_are_nan_where_nothing_can_raise():
    """On a GPU: decided from the label, so it cannot pass for a -inf logit that luffy or grpo would swallow."""
    labels, partials = torch.tensor([5, 300, -100]), torch.tensor([[1.0, 2.0, -0.5, 0.3]] * 3)
    logp, entropy, _, rows = finish_rows(partials, labels, Shard(0, 300, -100, 1.0), torch.float32)
    assert logp[0].isfinite() and logp[1].isnan() and logp[2] == 0
    assert entropy[1].isfinite() and rows[1, 2].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_stray_label_is_nan(backend, device):
    rows = torch.tensor([[1.0, 2.0, math.nan, 0.5]], device=device)
    with use_backend(backend):
        grad = shard_ops.grad(torch.randn(1, 300, device=device), torch.tensor([300], device=device), rows,
                              torch.tensor([[-1.0, 0.0, 0.0]], device=device), 0, 300, -100, 1.0)
    assert grad.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [0, 1])
def test_no_rows_and_one_row(backend, T, device):
    stats, grad = run(backend, torch.randn(T, 77, device=device), torch.zeros(T, dtype=torch.int64, device=device),
                      torch.ones(T, 3, device=device))
    assert stats.logp.shape == (T,) and grad.shape == (T, 77)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_masked(backend, device):
    stats, grad = run(backend, torch.full((4, 77), math.nan, device=device), torch.full((4,), -100, device=device), ONES.to(device))
    assert not stats.logp.any() and not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_past_two_to_the_31(backend, device):
    """The third row starts 2^31 + 128 elements into the buffer, though its stride fits 32 bits: a 32-bit product would wrap."""
    V, stride = 300, 2**30 + 64
    buffer = torch.empty(2 * stride + V, dtype=torch.bfloat16, device=device)  # 4 GiB of address space; three rows are touched
    logits = buffer.as_strided((3, V), (stride, 1))
    values = (torch.randn(3, V) * 3).bfloat16().to(device)
    logits.copy_(values)
    labels, grads = torch.tensor([3, 299, 150], device=device), torch.ones(3, 3, device=device)
    small = run(backend, values, labels, grads)
    stats, grad = run(backend, logits, labels, grads, overwrite=True)
    assert torch.equal(stats.logp, small[0].logp) and torch.equal(grad, small[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_and_expanded_logits(backend, device):
    labels, shard = torch.randint(0, 40, (6,), device=device), Shard(0, 40, -100, 1.0)
    logits = torch.randn(40, 6, device=device)
    with use_backend(backend):
        assert torch.equal(token_stats(logits.T, labels, shard).logp, token_stats(logits.T.contiguous(), labels, shard).logp)
        row = torch.randn(1, 40, device=device)
        assert torch.equal(token_stats(row.expand(6, 40), labels, shard).logp, token_stats(row.repeat(6, 1), labels, shard).logp)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [-1e9, -1e10, -3e12, -1e20, -1e30, torch.finfo(torch.float32).min, -math.inf])
@pytest.mark.parametrize("V", [5003, 140000])  # a block full of masks; a part of a row (C++) too
def test_finite_masks_are_as_good_as_infinite_ones(backend, mask, V, device):
    """The first columns of a row, many blocks of them: their own maximum must not become a reference that 24 bits cannot hold."""
    logits, labels = torch.randn(3, V), torch.tensor([V - 1, V - 7, V - 2])
    logits[:, : V // 3 * 2] = -math.inf
    expected, expected_grad = run("eager", logits, labels, ONES[:3])
    logits[:, : V // 3 * 2] = mask
    stats, grad = run(backend, logits.to(device), labels.to(device), ONES[:3].to(device))
    for x, y in zip(stats, expected, strict=True):
        torch.testing.assert_close(x, y, atol=tol.LOGP_FP32, rtol=tol.LOGP_FP32_RELATIVE)
    torch.testing.assert_close(grad.cpu(), expected_grad, atol=tol.GRAD_FP32, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [-1e10, -1e20])
def test_a_shard_full_of_masks_is_as_good_as_an_empty_one(backend, mask, device):
    """The other tensor-parallel rank holds the row's real logits: nothing of this one's may reach the merged sums."""
    here, there = torch.full((2, 300), mask), torch.randn(2, 300)
    labels = torch.tensor([301, 599], device=device)
    with use_backend(backend):
        partials = [shard_ops.stats(x.to(device), labels, start, 600, -100, 1.0).cpu() for x, start in ((here, 0), (there, 300))]
    logp, entropy, _, _ = finish_rows(merge_partials(torch.stack(partials)), labels.cpu(), Shard(0, 600, -100, 1.0), torch.float32)
    truth = there.double().log_softmax(1)
    torch.testing.assert_close(logp, truth.gather(1, labels.cpu()[:, None] - 300)[:, 0], atol=tol.LOGP_FP32, rtol=0)
    torch.testing.assert_close(entropy, -(truth.exp() * truth).sum(1), atol=tol.ENTROPY_FP32, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_range_of_the_logits(backend, dtype, sign, device):
    """Up to 1e9 as documented, from 2^31 ln 2 on NaN in every backend, statistics and gradient: never a wrong number."""
    labels = torch.tensor([5, 6, 7, 8], device=device)
    near = (torch.randn(4, 300) * 3 + sign * 1e9).to(dtype)
    stats, _ = run(backend, near.to(device), labels, ONES.to(device))
    for x, y in zip(stats, token_stats_reference(near, labels.cpu()), strict=True):
        torch.testing.assert_close(x.double(), y, atol=tol.LOGP_FAR, rtol=tol.LOGP_FP32_RELATIVE)
    for size in (1.5e9, 3e9, 1e10, 1e20, 3e38):
        far = (torch.randn(4, 300) * 3 + sign * size).to(dtype).to(device)
        stats, grad = run(backend, far, labels, ONES.to(device))
        assert all(x.isnan().all() for x in stats) and grad.isnan().all()
