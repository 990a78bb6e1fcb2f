"""mm_fp32_ against fp64: sizes off every tile border, transposed and strided views, accumulation, threads."""

import pytest
import torch

from megatron_plugin.kernels.cpu_gemm import mm_fp32_, offers_mm_fp32
from tests import tolerances as tol


@pytest.fixture(autouse=True)
def _runs():
    if not offers_mm_fp32():
        pytest.skip("this CPU has no AVX512-BF16, or there is no compiler")


def _factor(rows: int, columns: int, layout: str) -> torch.Tensor:
    match layout:
        case "rows":
            return torch.randn(rows, columns).bfloat16()
        case "columns":
            return torch.randn(columns, rows).bfloat16().t()
        case "slice":  # rows at odd addresses
            return torch.randn(rows, columns + 3).bfloat16()[:, 1 : columns + 1]
        case "every second":  # no unit stride at all
            return torch.randn(2 * rows, 2 * columns).bfloat16()[::2, ::2]
    raise KeyError(layout)


def _check(out, a, b, before=0.0):
    exact, size = a.double() @ b.double() + before, a.double().abs() @ b.double().abs()
    assert ((out.double() - exact).abs() <= tol.MM_FP32 * (size + abs(before)) + 1e-30).all(), ((out.double() - exact).abs() / size).max()


# one of everything; odd K; one tile exactly; a row and a column more; more rows than a block (240); more columns than a block (256); K over two depths
SIZES = ((1, 1, 1), (5, 33, 7), (12, 32, 2), (13, 33, 64), (501, 40, 129), (40, 601, 130), (30, 70, 2051))


@pytest.mark.parametrize("a_layout, b_layout", [("rows", "rows"), ("columns", "rows"), ("rows", "columns"), ("slice", "slice"), ("every second", "columns")])
@pytest.mark.parametrize("M, N, K", SIZES)
def test_product_and_sum(M, N, K, a_layout, b_layout):
    a, b = _factor(M, K, a_layout), _factor(K, N, b_layout)
    out = torch.full((M, N), torch.nan)
    mm_fp32_(out, a, b, False)
    _check(out, a, b)
    out.fill_(0.25)
    mm_fp32_(out, a, b, True)
    _check(out, a, b, before=0.25)


def test_threads_share_the_work():
    """Three threads with 21 blocks of the long side, each packing into its own scratch; the same bits as one thread."""
    before, a, b = torch.get_num_threads(), _factor(5000, 512, "columns"), _factor(512, 64, "rows")
    one, out = torch.zeros(5000, 64), torch.zeros(5000, 64)
    try:
        torch.set_num_threads(1)
        mm_fp32_(one, a, b, False)
        torch.set_num_threads(3)
        for _ in range(200):  # on a busy machine one thread may do all of it: a shared scratch showed in 1 of 20
            mm_fp32_(out.fill_(torch.nan), a, b, False)
            assert torch.equal(out, one)
    finally:
        torch.set_num_threads(before)
    _check(one, a, b)


def test_only_the_block_asked_for_is_written():
    total, a, b = torch.full((20, 50), 7.0), _factor(20, 9, "rows"), _factor(9, 35, "rows")
    mm_fp32_(total[:, 8:43], a, b, False)
    _check(total[:, 8:43], a, b)
    assert (total[:, :8] == 7).all() and (total[:, 43:] == 7).all()


def test_one_bad_factor_spoils_its_row_only():
    a, b, out = _factor(20, 9, "rows"), _factor(9, 35, "rows"), torch.zeros(20, 35)
    a[4, 8] = torch.inf
    b[0, 3] = torch.nan
    mm_fp32_(out, a, b, False)
    bad = torch.zeros(20, 35, dtype=torch.bool)
    bad[4], bad[:, 3] = True, True
    assert torch.equal(~out.isfinite(), bad)


def test_empty_products():
    out = torch.full((4, 5), 7.0)
    mm_fp32_(out, torch.zeros(4, 0).bfloat16(), torch.zeros(0, 5).bfloat16(), True)
    assert (out == 7).all()
    mm_fp32_(out, torch.zeros(4, 0).bfloat16(), torch.zeros(0, 5).bfloat16(), False)
    assert not out.any()
    mm_fp32_(torch.zeros(0, 5), torch.zeros(0, 3).bfloat16(), torch.zeros(3, 5).bfloat16(), False)


def test_what_it_cannot_take_is_refused():
    a, b = _factor(4, 6, "rows"), _factor(6, 5, "rows")
    with pytest.raises(ValueError, match=r"a \[4, 6\], b \[4, 6\], out \[4, 5\]; expected \[M, K\], \[K, N\], \[M, N\]"):
        mm_fp32_(torch.zeros(4, 5), a, a, False)
    with pytest.raises(ValueError, match="out torch.float32, a torch.float32, b torch.bfloat16; expected"):
        mm_fp32_(torch.zeros(4, 5), a.float(), b, False)
    with pytest.raises(ValueError, match=r"strides \(1, 4\); expected rows of contiguous columns"):
        mm_fp32_(torch.zeros(5, 4).t(), a, b, False)
