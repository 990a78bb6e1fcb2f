"""The products of the hidden-in ops: sums of dW over chunks, fp32 from half precision, with and without a product that does it at once."""

import pytest
import torch

from megatron_plugin.kernels import gemm
from megatron_plugin.kernels.weight_grad import own_weight_grad
from tests import tolerances as tol
from tests.kernels.linear_oracle import dense, distance, problem
from tests.kernels.test_linear_token_loss import one_pass, two_pass

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["best", "plain"])
def product(request, monkeypatch):
    """plain: a CPU without AVX512-BF16 or a compiler, a torch before 2.8 on a GPU."""
    if request.param == "plain":
        monkeypatch.setattr(gemm, "offers_mm_fp32", lambda: False)
        monkeypatch.setattr(gemm, "_offers_fp32", lambda *_: False)
        monkeypatch.setattr(gemm, "BLOCK", {"cpu": 1, "cuda": 1})  # blocks of 64 columns, the last one smaller
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("total_dtype", [None, torch.float32, torch.bfloat16], ids=["same", "fp32", "bf16"])
def test_products_over_whatever_was_there(dtype, total_dtype, product, device):
    """assign_ reads nothing of its target (NaN here), accumulate_ adds to it; dz and x are slices of wider rows.  bf16: main_grad may be."""
    dz = torch.randn(20, 80, dtype=torch.float64).to(dtype).to(device)[:, :70]
    x = torch.randn(20, 16, dtype=torch.float64).to(dtype).to(device)[:, :8]
    total = torch.full((70, 8), torch.nan, dtype=total_dtype or dtype, device=device)
    truth = dz.double().t() @ x.double()
    roundings = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    bound = max(roundings[dtype], roundings[total.dtype])
    gemm.assign_(total, dz, x)
    assert distance(total, truth) <= bound
    gemm.accumulate_(total, dz, x)
    assert distance(total, 2 * truth) <= bound
    exact = total.dtype == torch.float32 and product == "best" and (device.type == "cuda" or dtype == torch.bfloat16)
    if exact and gemm._ours(x.cpu()):
        assert distance(total, 2 * truth) <= 5e-7, "an fp32 sum of an fp32 product"


@pytest.mark.parametrize("chunks", [1, 2, 3, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_of_dw_does_not_lose_what_is_small(chunks, dtype, device):
    """All of one sign: a sum in half precision would lose a little with each chunk; here 40 chunks are as exact as one."""
    dz, x = torch.rand(40, 70, dtype=torch.float64), torch.rand(40, 8, dtype=torch.float64)
    dz, x = dz.to(dtype).to(device), x.to(dtype).to(device)
    total = own_weight_grad(torch.empty(73, 8, dtype=dtype, device=device), chunks, 70)
    for part in torch.arange(40).chunk(chunks):
        total.add(dz[part], x[part])
    truth = dz.double().t() @ x.double()
    rounding = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    assert distance(total.result()[:70], truth) <= 1.2 * rounding  # measured 1.1: a product and its sum are rounded, whatever the number of chunks
    assert total.result().shape == (73, 8) and not total.result()[70:].any()


@pytest.mark.parametrize("way", [one_pass, two_pass])
def test_fp32_logits_and_dw_with_either_product(way, product, device):
    """fp32 logits by blocks of fp32 where nothing else is there, and dW's products rounded once each."""
    hidden, weight, labels, inputs = problem(300, 64, 501, dtype=torch.bfloat16)
    truth, true_grads = dense(hidden, weight, labels, "dft", inputs=inputs)
    _, rival = dense(hidden, weight, labels, "dft", inputs=inputs, dtype=torch.bfloat16)
    out, grads = way(hidden, weight, labels, "dft", inputs=inputs, device=device, chunk_tokens=40, logits_dtype=torch.float32)
    torch.testing.assert_close(out.per_token.logp.cpu().double(), truth.per_token.logp, atol=tol.LINEAR_VALUES, rtol=tol.LINEAR_VALUES)
    assert all(distance(grads[name], x) <= tol.LINEAR_FP32_LOGITS for name, x in true_grads.items())
    _, grads = way(hidden, weight, labels, "dft", inputs=inputs, device=device, chunk_tokens=40)
    assert all(distance(grads[name], x) <= tol.EAGER_FACTOR * distance(rival[name], x) for name, x in true_grads.items())


def test_blocks_of_a_large_head_are_small():
    """Where addmm does not write into an fp32 sum, a block's product is a temporary: 16 MiB on a GPU, beside a chunk and dX."""
    weight = torch.empty(151936, 4096, device="meta")  # any device but the CPU takes the GPU's size
    blocks = list(gemm.vocabulary_blocks(weight))
    assert max(b.stop - b.start for b in blocks) * 4096 * 4 <= 2**24
    assert blocks[0].start == 0 and blocks[-1].stop == 151936 and all(a.stop == b.start for a, b in zip(blocks, blocks[1:], strict=False))
