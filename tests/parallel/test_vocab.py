"""Tensor parallelism in real gloo processes: every split of the vocabulary gives the dense numbers."""

import math
import re

import pytest
import torch

from megatron_plugin.kernels.reference import grad_reference, token_stats_reference
from tests import tolerances as tol
from tests.kernels.cases import rows
from tests.spawn import on_ranks

RANKS = "tests.parallel.ranks"
V = 1204
# equal splits; uneven ones, with a shard of one column and one of none but padding
SPLITS = {1: [(0, V)], 2: [(0, 602, V), (0, 1, V), (0, 1000, V)], 3: [(0, 400, 401, V), (0, 5, 900, V)], 4: [(0, 301, 602, 903, V), (0, 1, 2, 1203, V)]}
CASES = [(size, bounds) for size, splits in SPLITS.items() for bounds in splits]


def _label_on_every_shard(bounds, V=V):
    """First and last column of every shard, and a masked row."""
    return torch.tensor([x for a, b in zip(bounds, bounds[1:], strict=False) for x in (a, b - 1)] + [-100])


@pytest.mark.parametrize("size, bounds", CASES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "offset", "masked_columns", "peaked"])
def test_every_split_equals_dense(size, bounds, kind):
    labels = _label_on_every_shard(bounds)
    logits, grads = rows(kind, len(labels), V), torch.randn(len(labels), 3)
    results = on_ranks(size, RANKS, "shard_results", logits=logits, labels=labels, bounds=bounds, grads=grads)
    logp, entropy, _ = token_stats_reference(logits, labels)
    for rank, (got_logp, got_entropy, got_lse, grad) in enumerate(results):
        finite = logp.isfinite()
        assert torch.equal(got_logp.isfinite(), finite)
        assert ((got_logp.double() - logp).abs() <= tol.TP_LOGP + tol.LOGP_FP32_RELATIVE * logp.abs())[finite].all()
        torch.testing.assert_close(got_entropy.double(), entropy, atol=tol.TP_ENTROPY, rtol=0)
        truth = grad_reference(logits, labels, grads)[:, bounds[rank] : bounds[rank + 1]]
        torch.testing.assert_close(grad.double(), truth, atol=tol.GRAD_FP32, rtol=0)
        for mine, first in zip((got_logp, got_entropy, got_lse), results[0], strict=False):
            assert torch.equal(mine, first), "ranks must hold the same bits"


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_vocabulary(backend, dtype):
    """Megatron pads the vocabulary to a multiple of the ranks: the last ranks hold columns that are no tokens, full of anything."""
    size, true_size = 4, 850  # rank 2 ends inside its shard, rank 3 is all padding
    logits = rows("normal", 6, V).to(dtype)
    logits[:, true_size:] = 50.0
    labels, grads = torch.tensor([0, 300, 301, 602, 849, -100]), torch.randn(6, 3)
    bounds = (0, 301, 602, 903, V)
    results = on_ranks(size, RANKS, "shard_results", logits=logits, labels=labels, bounds=bounds, grads=grads, vocab_size=true_size, backend=backend)
    logp, entropy, _ = token_stats_reference(logits, labels, vocab_size=true_size)
    grad = torch.cat([r[3] for r in results], 1)
    torch.testing.assert_close(results[3][0].double(), logp, atol=tol.TP_LOGP, rtol=tol.LOGP_FP32_RELATIVE)
    torch.testing.assert_close(results[0][1].double(), entropy, atol=tol.TP_ENTROPY, rtol=0)
    bound = 2.0**-8 if dtype == torch.bfloat16 else tol.GRAD_FP32
    torch.testing.assert_close(grad.double(), grad_reference(logits, labels, grads, vocab_size=true_size), atol=bound, rtol=bound)
    assert not grad[:, true_size:].any()


def test_fp64_under_tensor_parallelism():
    bounds, labels = (0, 5, 900, V), torch.tensor([0, 4, 5, 899, 900, V - 1])
    logits, grads = rows("offset", 6, V).double(), torch.randn(6, 3).double()
    results = on_ranks(3, RANKS, "shard_results", logits=logits, labels=labels, bounds=bounds, grads=grads)
    for got, truth in zip(results[1][:3], token_stats_reference(logits, labels), strict=True):
        torch.testing.assert_close(got, truth, atol=tol.STATS_FP64, rtol=1e-15)
    torch.testing.assert_close(torch.cat([r[3] for r in results], 1), grad_reference(logits, labels, grads), atol=tol.STATS_FP64, rtol=0)


def test_one_all_gather_forward_and_nothing_backward():
    logits, labels = torch.randn(6, 1200), torch.randint(0, 1200, (6,))
    for forward, backward in on_ranks(3, RANKS, "collectives", logits=logits, labels=labels):
        assert [name for name, _ in forward] in (["all_gather_single"], ["all_gather_into_tensor"])
        assert forward[0][1] == 3 * (6 + 1) * 4, "the gathered tensor is [ranks, T + 1, 4]: one row says which columns a rank holds"
        assert backward == []


def test_masked_rows_full_of_nan_on_one_rank_only():
    logits, labels = torch.randn(3, V), torch.tensor([5, -100, 900])
    logits[1, 602:] = math.nan
    for logp, entropy, lse, grad in on_ranks(
        2, RANKS, "shard_results", logits=logits, labels=labels, bounds=(0, 602, V), grads=torch.ones(3, 3)
    ):
        assert logp[1] == entropy[1] == lse[1] == 0 and not grad[1].any() and grad.isfinite().all()


@pytest.mark.parametrize("loss, params", [("dft", {}), ("chord_phi", {}), ("idft", {}), ("eaft", {}), ("sft", {"entropy_bonus": 0.1, "z_loss": 0.01}),
                                          ("grpo", {}), ("luffy", {}), ("srft_demo", {})], ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_losses_are_the_same_number_at_every_size(loss, params, backend):
    """One kernel for a whole vocabulary; two around the all-gather for a split one."""
    T, size = 9, 4
    logits, labels = torch.randn(T, V) * 2, torch.randint(0, 1200, (T,))
    labels[4] = -100
    inputs = dict(coefficient=torch.rand(T), advantage=torch.randn(T), old_logp=-torch.rand(T) * 9)
    arguments = dict(logits=logits, labels=labels, loss=loss, params=params, inputs=inputs, vocab_size=1200, backend=backend)
    ((dense, dense_grad, dense_metrics),) = on_ranks(1, RANKS, "loss_results", **arguments)
    split = on_ranks(size, RANKS, "loss_results", **arguments)
    for value, _, metrics in split:
        torch.testing.assert_close(value, dense, atol=0, rtol=1e-6)
        assert torch.equal(value, split[0][0]), "ranks must hold the same bits"
        assert metrics == pytest.approx(dense_metrics, rel=2e-6, abs=2e-6)
    torch.testing.assert_close(torch.cat([g for _, g, _ in split], 1), dense_grad, atol=tol.TP_GRAD, rtol=1e-5)


@pytest.mark.parametrize("vocab_start, vocab_size, words", [
    (None, 1300, "does not fit 600 logits columns on each of 2"),       # beyond what the ranks hold
    (None, 0, "does not fit"),
    ((0, 600), None, "vocab_start=.* was given without vocab_size"),
    ((5, 600), 1200, r"hold columns \[5, 605\), \[600, 1200\), which do not tile the vocabulary \[0, 1200\)"),   # overlap
    ((0, 700), 1300, "do not tile"),                                      # gap
    ((0, 600), 1300, "do not tile"),                                      # ends too early
    ((0, 0), 600, "do not tile"),                                         # the same shard twice
])
def test_vocabularies_that_do_not_fit_raise_on_every_rank(vocab_start, vocab_size, words):
    """On every rank: a rank that raised alone would leave the others waiting in the all-gather."""
    messages = on_ranks(2, RANKS, "error_of", columns=600, vocab_start=vocab_start, vocab_size=vocab_size)
    assert all(message and re.search(words, message) for message in messages), messages


def test_unequal_shards_without_vocab_start_raise_on_every_rank():
    """The default assumes equal shards; ranks that differ must not produce a plausible number."""
    messages = on_ranks(3, RANKS, "error_of_uneven", columns=(600, 500, 100))
    assert all(message and "do not tile" in message for message in messages), messages
