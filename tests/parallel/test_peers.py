"""Mistakes that other trainers shipped, with the number each of them gives and ours beside it.  Reproduced with the real megatron-core on
gloo ranks where the mistake is in what is handed to it or taken from it, with the formula in question where it is in the trainer's own code."""

import math

import pytest
import torch

from megatron_plugin.kernels.reference import token_stats_reference
from tests import tolerances as tol
from tests.spawn import on_ranks

RANKS = "tests.parallel.peers_ranks"
H, V, S = 8, 50, 12  # hidden, vocabulary, positions
CLOSE = dict(atol=tol.NORMALISER_GRAD, rtol=0)


def _batch(lengths):
    mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).float()
    return dict(hidden=torch.randn(len(lengths), S, H), labels=torch.randint(0, V, (len(lengths), S)), mask=mask)


def _gradient(batch, weight, weights=None):
    """Of sum(weights x -log p) in fp64; the token mean by default."""
    head = weight.double().requires_grad_()
    logp, _, _ = token_stats_reference(batch["hidden"].double() @ head.T, batch["labels"])
    weights = batch["mask"] / batch["mask"].sum() if weights is None else weights
    (-logp * weights.double()).sum().backward()
    return head.grad


def _rows(batch, *rows):
    return {name: x[list(rows)] for name, x in batch.items()}


def _steps(size, batches, weight, **arguments):
    """(the peer's gradient, ours), on each rank the same."""
    peer = arguments.pop("peer")
    both = [on_ranks(size, RANKS, "step", micro_batches=batches, weight=weight, peer=p, **arguments) for p in (peer, None)]
    for gradients in both:
        assert all(torch.equal(g, gradients[0]) for g in gradients)
    return [gradients[0].double() for gradients in both]


def test_two_tuples_of_local_means_are_multiplied_by_the_context_parallel_size():
    """NVIDIA/Megatron-LM#673, NovaSky-AI/SkyRL#1751: the schedule multiplies a two-tuple's loss by C, which presumes a division by the count
    of all slices.  A mean over the own slice gives C times the gradient, exactly 2 with equal slices; Adam and a loss curve hide it."""
    batch, weight = _batch([S, S]), torch.randn(V, H) * 0.3
    truth = _gradient(batch, weight)
    peer, ours = _steps(2, [[batch]], weight, context=2, peer="local mean")
    torch.testing.assert_close(peer, 2 * truth, **CLOSE)
    torch.testing.assert_close(ours, truth, **CLOSE)


def test_slices_with_unequal_masks_weigh_the_same():
    """PrimeIntellect-ai/prime-rl#1961: local means over context-parallel slices; beyond the factor the tokens of a short slice weigh more."""
    batch, weight = _batch([7, 9]), torch.randn(V, H) * 0.3
    truth = _gradient(batch, weight)
    peer, ours = _steps(2, [[batch]], weight, context=2, peer="local mean")
    assert torch.nn.functional.cosine_similarity(peer.flatten(), truth.flatten(), dim=0) < 0.999
    torch.testing.assert_close(ours, truth, **CLOSE)


def test_means_of_micro_batches_are_not_a_mean_of_tokens():
    """verl-project/verl#5625, #7321: each micro-batch divided by its own tokens, then by the number of micro-batches."""
    batch, weight = _batch([S, 2, 1, S]), torch.randn(V, H) * 0.3
    truth = _gradient(batch, weight)
    peer, ours = _steps(1, [[_rows(batch, 0), _rows(batch, 1), _rows(batch, 2), _rows(batch, 3)]], weight, peer="local mean")
    own_means = batch["mask"] / batch["mask"].sum(1, keepdim=True) / 4
    torch.testing.assert_close(peer, _gradient(batch, weight, own_means), **CLOSE)
    assert (peer - truth).norm() > 0.3 * truth.norm()
    torch.testing.assert_close(ours, truth, **CLOSE)


def test_fully_masked_sequences_are_no_tokens():
    """THUDM/slime, backends/megatron_utils/loss.py: num_tokens = sum of clamp_min(loss_mask.sum(), 1) counts a token for every masked sequence."""
    batch, weight = _batch([3, 0, 0, 2]), torch.randn(V, H) * 0.3
    truth = _gradient(batch, weight)
    peer, ours = _steps(2, [[_rows(batch, 0, 1)], [_rows(batch, 2, 3)]], weight, peer="clamped counts")
    torch.testing.assert_close(peer, truth * 5 / 7, **CLOSE)
    torch.testing.assert_close(ours, truth, **CLOSE)


def test_a_step_without_any_token_is_a_gradient_of_zero():
    """What that clamp is for: our counts may be 0, on one rank or on all."""
    batch, weight = _batch([0, 0]), torch.randn(V, H) * 0.3
    for gradient in on_ranks(2, RANKS, "step", micro_batches=[[_rows(batch, 0)], [_rows(batch, 1)]], weight=weight):
        assert torch.equal(gradient, torch.zeros(V, H))


@pytest.mark.filterwarnings("ignore:c10d")
def test_vocabulary_shards_without_the_label_get_their_softmax_gradient():
    """modelscope/ms-swift#9778, fixed by #9947: the label's log p summed by a plain all_reduce inside autograd.  The values are right, the
    rank that holds the label has the right gradient, and all others have none: their logits of wrong tokens are never pushed down."""
    logits, labels = torch.randn(2, 5, 40), torch.randint(0, 20, (2, 5))  # all labels on rank 0
    logp, _, _ = token_stats_reference(leaf := logits.double().requires_grad_(), labels)
    logp.sum().backward()
    truth = leaf.grad.chunk(2, -1)
    for peer in (True, False):
        (value, owner), (_, other) = on_ranks(2, RANKS, "logp_gradient", logits=logits, labels=labels, peer=peer)
        torch.testing.assert_close(value.double(), logp.detach(), atol=tol.TP_LOGP, rtol=0)
        torch.testing.assert_close(owner.double(), truth[0], atol=tol.TP_GRAD, rtol=0)
        if peer:
            assert torch.equal(other, torch.zeros_like(other)) and truth[1].norm() > 0.1
        else:
            torch.testing.assert_close(other.double(), truth[1], atol=tol.TP_GRAD, rtol=0)


def test_the_entropy_after_a_loss_of_the_same_logits():
    """verl-project/verl#1672, #2484, NVIDIA/Megatron-LM#1594: vocab_parallel_cross_entropy leaves probabilities where fp32 logits were, and the
    entropy taken of them afterwards is close to log V, whatever the model thinks.  Our ops leave the logits alone unless told otherwise."""
    logits, labels = 3 * torch.randn(2, 5, 40), torch.randint(0, 40, (2, 5))
    logp, truth, _ = token_stats_reference(logits.double(), labels)
    for loss, entropy in on_ranks(2, RANKS, "entropy_after_loss", logits=logits, labels=labels, peer=True):
        torch.testing.assert_close(loss.double(), -logp.sum(), atol=0, rtol=tol.NORMALISER_LOSS)
        assert (entropy - math.log(40)).abs().max() < 0.1 and (entropy - truth).abs().min() > 0.5
    for loss, entropy in on_ranks(2, RANKS, "entropy_after_loss", logits=logits, labels=labels, peer=False):
        torch.testing.assert_close(loss.double(), -logp.sum(), atol=0, rtol=tol.NORMALISER_LOSS)
        torch.testing.assert_close(entropy.double(), truth, atol=tol.TP_ENTROPY, rtol=0)


def test_padded_columns_are_not_in_the_softmax():
    """Megatron pads the vocabulary so that ranks and tiles divide it, and its cross-entropy counts the padding: 14 columns of logit 0 here.
    A checkpoint whose padding rows are zeros thus trains on another distribution than the engine samples from."""
    logits, labels = torch.randn(2, 5, 64), torch.randint(0, V, (2, 5))
    logits[..., V:] = 0.0
    truth = -token_stats_reference(logits[..., :V].double(), labels)[0]
    added = (1 + (64 - V) / logits[..., :V].double().exp().sum(-1)).log()  # what the padding adds to log-sum-exp
    for nll in on_ranks(2, RANKS, "padded_nll", logits=logits, labels=labels, vocab_size=V, peer=True):
        torch.testing.assert_close(nll.double(), truth + added, atol=tol.TP_LOGP, rtol=0)
        assert added.min() > 0.1
    for nll in on_ranks(2, RANKS, "padded_nll", logits=logits, labels=labels, vocab_size=V, peer=False):
        torch.testing.assert_close(nll.double(), truth, atol=tol.TP_LOGP, rtol=0)
