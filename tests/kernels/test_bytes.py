"""Bytes per logit, counted in the interpreter: stats 1 read; grad 1 read, 1 write; loss 2 reads, 1 write; masked rows are not read."""

import pytest
import torch

from megatron_plugin.kernels import weighting
from megatron_plugin.kernels.grad import grad_triton
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.loss import loss_triton
from megatron_plugin.kernels.objective import Objective, Twin
from megatron_plugin.kernels.scale import scale_triton
from megatron_plugin.kernels.stats import stats_triton

if not torch.cuda.is_available():
    from tests.kernels.byte_meter import byte_meter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted in the interpreter, which a GPU run does not load")

# odd vocabulary with edges on both sides; a whole number of blocks
SHAPES = [(4, 50257), (4, 32768)]


@pytest.mark.parametrize("T, V", SHAPES)
@pytest.mark.parametrize("masked", [0, 1])
def test_stats_reads_live_logits_once(T, V, masked):
    logits, labels = torch.randn(T, V).bfloat16(), torch.randint(0, V, (T,))
    labels[:masked] = -100
    with byte_meter(logits) as meter:
        stats_triton(logits, labels, Shard(0, V, -100, 1.0))
    assert meter.passes("load") == pytest.approx((T - masked) / T, rel=1e-3)
    assert meter.passes("store") == 0


@pytest.mark.parametrize("T, V", SHAPES)
@pytest.mark.parametrize("masked", [0, 1])
def test_grad_reads_live_logits_once_and_writes_once(T, V, masked):
    logits, labels = torch.randn(T, V).bfloat16(), torch.randint(0, V, (T,))
    labels[:masked] = -100
    rows = torch.tensor([0.0, 2.0, -1.0, 1.0]).repeat(T, 1)
    with byte_meter(logits) as meter:
        grad_triton(logits, logits, labels, rows, torch.ones(T, 3), Shard(0, V, -100, 1.0))
    assert meter.passes("load") == pytest.approx((T - masked) / T, rel=1e-3)
    assert meter.passes("store") == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("T, V", SHAPES)
@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("how, reads, writes", [("whole", 2, 1), ("split", 1, 1), ("values", 1, 0)])
def test_loss_reads_live_logits(T, V, masked, how, reads, writes):
    """One launch reads twice, the second time from the cache as far as it goes; behind an all-gather, or without a gradient, once."""
    logits, labels = torch.randn(T, V).bfloat16(), torch.randint(0, V, (T,))
    labels[:masked] = -100
    shard, objective = Shard(0, V, -100, 1.0), Objective(None, twin=Twin(weighting.chord_phi, metrics=1))
    partials = stats_triton(logits, labels, shard)[None] if how == "split" else None
    with byte_meter(logits) as meter:
        loss_triton(logits, None if how == "values" else logits, labels, shard, objective, partials)
    assert meter.passes("load") == pytest.approx(reads * (T - masked) / T, rel=1e-3)
    assert meter.passes("store") == pytest.approx(writes, rel=1e-3)


@pytest.mark.parametrize("factor, passes", [(1.0, 0), (0.5, 1)])
def test_a_factor_of_one_moves_nothing(factor, passes):
    x = torch.randn(4, 5003).bfloat16()
    expected = x * factor
    with byte_meter(x) as meter:
        scale_triton(x, torch.tensor(factor))
    assert torch.equal(x, expected) and meter.passes("load") == meter.passes("store") == passes
