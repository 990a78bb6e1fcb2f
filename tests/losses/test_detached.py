"""The gradient is the one the method says: with the weight frozen where it is detached, through everything where it is not."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs
from tests.losses.oracle import DETACHED, DIFFERENTIATED, STEPS, VOCAB, dense_stats, random_tokens

STEP = 1e-5
NUMERIC = 2e-9  # central differences of a function of size 1 at this step; measured 5.6e-10 (cll_sigmoid)


def summed(name: str, labels_T: Tensor, inputs: TokenInputs):
    loss = bind(name).for_vocabulary(VOCAB)
    return lambda logits_TV: loss(dense_stats(logits_TV, labels_T), inputs).loss.sum()


def central_differences(f, x: Tensor) -> Tensor:
    x = x.detach().clone()
    slope = torch.empty_like(x)
    for i in range(x.numel()):
        here = x.view(-1)[i].item()
        x.view(-1)[i] = here + STEP
        up = f(x)
        x.view(-1)[i] = here - STEP
        slope.view(-1)[i] = (up - f(x)) / (2 * STEP)
        x.view(-1)[i] = here
    return slope


def smooth_tokens():
    """Tokens away from the kinks of grpo's clips, where a finite difference would straddle one."""
    logits_TV, labels_T, inputs = random_tokens(T=12, seed=1)
    ratio_T = (dense_stats(logits_TV, labels_T).logp - inputs.old_logp).exp().detach()
    for kink in (0.8, 1.2, 3.0):
        assert ((ratio_T - kink).abs() > 1e-3).all(), "choose another seed"
    return logits_TV, labels_T, inputs


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_differentiated_losses_pass_the_naive_gradcheck(name):
    logits_TV, labels_T, inputs = smooth_tokens()
    assert gradcheck(summed(name, labels_T, inputs), logits_TV)


@pytest.mark.parametrize("name", [name for name in DETACHED if name not in STEPS])
def test_detached_losses_fail_the_naive_gradcheck(name):
    """The value depends on the logits through the weight too; a gradient that agreed with it would be the forbidden one."""
    logits_TV, labels_T, inputs = smooth_tokens()
    assert not gradcheck(summed(name, labels_T, inputs), logits_TV, raise_exception=False)


@pytest.mark.parametrize("name", DETACHED)
def test_detached_losses_are_gradients_of_the_frozen_weight(name):
    logits_TV, labels_T, inputs = smooth_tokens()
    terms = bind(name).for_vocabulary(VOCAB)(dense_stats(logits_TV, labels_T), inputs)
    (got_TV,) = torch.autograd.grad(terms.loss.sum(), logits_TV)
    frozen_T = terms.weight.clone()
    expected_TV = central_differences(lambda z: -(frozen_T * dense_stats(z, labels_T).logp).sum(), logits_TV)
    torch.testing.assert_close(got_TV, expected_TV, atol=NUMERIC, rtol=0)


def test_a_differentiated_dft_would_push_rare_labels_down():
    """Why it matters: at p = 0.1 < 1/e the gradient of p log p has the other sign."""
    logits_TV = torch.tensor([[0.1, 0.9]], dtype=torch.float64).log().requires_grad_()
    stats = dense_stats(logits_TV, torch.tensor([0]))
    (wrong,) = torch.autograd.grad((-stats.logp.exp() * stats.logp).sum(), logits_TV, retain_graph=True)
    (right,) = torch.autograd.grad(bind("dft")(stats, TokenInputs()).loss.sum(), logits_TV)
    assert right[0, 0] < 0 < wrong[0, 0]
