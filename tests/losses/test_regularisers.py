"""entropy_bonus and z_loss: on their own, on top of every loss, and as the only users of dF/dH and dF/dlse."""

import math

import pytest
import torch

from megatron_plugin.losses.binding import bind
from tests.losses.oracle import FORMULAE, FP64, VOCAB, dense_stats, dlogits, expected_terms, random_tokens

C_H, C_Z = 0.03, 0.002


@pytest.mark.parametrize("name", FORMULAE)
def test_added_to_every_loss(name):
    logits_TV, labels_T, inputs = random_tokens()
    stats = dense_stats(logits_TV, labels_T)
    terms = bind(name, entropy_bonus=C_H, z_loss=C_Z).for_vocabulary(VOCAB)(stats, inputs)
    F_T, a_T, b_T = expected_terms(name, stats, inputs)
    H_T, lse_T = stats.entropy.detach(), stats.lse.detach()
    torch.testing.assert_close(terms.loss, F_T - C_H * H_T + C_Z * lse_T**2, atol=FP64, rtol=FP64)
    (grad_TV,) = torch.autograd.grad(terms.loss.sum(), logits_TV)
    expected_TV = dlogits(logits_TV, labels_T, a_T, b_T - C_H, 2 * C_Z * lse_T)
    torch.testing.assert_close(grad_TV, expected_TV, atol=FP64, rtol=FP64)
    torch.testing.assert_close(grad_TV.sum(-1), 2 * C_Z * lse_T, atol=1e-13, rtol=0)  # DESIGN 1: row sum c
    torch.testing.assert_close(terms.metrics["entropy_bonus"], -C_H * H_T, atol=FP64, rtol=FP64)
    torch.testing.assert_close(terms.metrics["z_loss"], C_Z * lse_T**2, atol=FP64, rtol=FP64)
    assert not any(column.requires_grad for column in terms.metrics.values())


def test_hand_case():
    """Uniform over 4: H = lse = ln 4."""
    stats = dense_stats(torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0]))
    terms = bind("sft", entropy_bonus=0.5, z_loss=0.1)(stats, random_tokens(T=1)[2])
    assert terms.loss.item() == pytest.approx(math.log(4) * 0.5 + 0.1 * math.log(4) ** 2)


def test_weight_is_that_of_the_loss():
    logits_TV, labels_T, inputs = random_tokens(T=4)
    stats = dense_stats(logits_TV, labels_T)
    assert torch.equal(bind("dft", entropy_bonus=C_H)(stats, inputs).weight, bind("dft")(stats, inputs).weight)


def test_coefficients_may_be_tensors_and_zero():
    logits_TV, labels_T, inputs = random_tokens(T=4)
    stats = dense_stats(logits_TV, labels_T)
    plain = bind("dft", z_loss=C_Z)(stats, inputs).loss
    torch.testing.assert_close(bind("dft", z_loss=torch.tensor(C_Z, dtype=torch.float64))(stats, inputs).loss, plain, atol=0, rtol=0)
    assert torch.equal(bind("dft", z_loss=0.0)(stats, inputs).loss, bind("dft")(stats, inputs).loss)
