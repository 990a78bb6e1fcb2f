"""Zig-zag slices of sequences and their gather: megatron-core's own order, exact there and back, gradients summed over the ranks."""

import pytest
import torch

from megatron_plugin.parallel.context import context_gather, context_slice
from tests.spawn import on_ranks

RANKS = "tests.parallel.context_ranks"


def test_the_order_by_hand():
    """C = 2, s = 8: the pieces of rank 0 are the first and the last."""
    mine = [on_ranks(2, RANKS, "there_and_back", x=torch.arange(8)[None], dim=1)[rank][0].tolist() for rank in range(2)]
    assert mine == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_there_and_back_is_exact(ranks, dtype):
    x = torch.arange(2 * 24 * 3).reshape(2, 24, 3).to(dtype)
    for dim in (1, -2):
        for rank, (mine, whole) in enumerate(on_ranks(ranks, RANKS, "there_and_back", x=x, dim=dim)):
            assert mine.shape == (2, 24 // ranks, 3), rank
            assert torch.equal(whole, x) and whole.dtype == dtype


def test_the_slices_are_megatron_cores():
    batch = {"tokens": torch.randint(0, 99, (2, 24)), "loss_mask": torch.rand(2, 24), "attention_mask": torch.rand(2, 1, 24, 24) > 0.5}
    for theirs, ours in on_ranks(3, RANKS, "megatron_slice", batch=batch):
        assert all(torch.equal(theirs[name], ours[name]) for name in batch)


def test_the_gradient_of_a_token_is_the_sum_over_the_ranks():
    """Small whole numbers, so that sums are exact.  A gather without the reduce-scatter would keep this rank's part alone."""
    x, weights = torch.zeros(12, 2), torch.randint(-9, 9, (3, 12, 2)).float()
    for rank, grad in enumerate(on_ranks(3, RANKS, "gathered_gradient", x=x, weights=weights, dim=0)):
        whole = weights.sum(0)
        assert torch.equal(grad, torch.cat((whole[2 * rank : 2 * rank + 2], whole[10 - 2 * rank : 12 - 2 * rank])))


def test_one_rank_copies_nothing():
    x = torch.rand(1, 5)
    assert context_slice(x, 1, None) is x and context_gather(x, 1, None) is x


def test_lengths_that_cannot_be_cut_are_named():
    message = on_ranks(2, RANKS, "error_of", op="slice", shape=(3, 10), dim=1)[0]
    assert "got 10 tokens along dim 1 of [3, 10], expected a multiple of 4" in message and "pad the rows" in message
    assert "got a slice of 5 tokens" in on_ranks(2, RANKS, "error_of", op="gather", shape=(3, 5), dim=1)[0]
    assert on_ranks(2, RANKS, "error_of", op="slice", shape=(3, 12), dim=1)[0] is None
