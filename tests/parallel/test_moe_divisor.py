"""N of models with mixture of experts: the arithmetic of megatron-core's own router.  Its token dispatchers do not run on a CPU: not run."""

from types import SimpleNamespace

import pytest
import torch

from megatron_plugin.parallel.normaliser import StepMask, coefficients, count_step, tokens_to_divide_by
from tests.spawn import on_ranks

RANKS = "tests.parallel.normaliser_ranks"
MOE = SimpleNamespace(num_moe_experts=8, moe_aux_loss_coeff=0.01, moe_z_loss_coeff=None)


def test_what_a_step_is_divided_by():
    def choose(**fields):
        return tokens_to_divide_by(SimpleNamespace(**{**vars(MOE), **fields}), loss_tokens=3, real_tokens=7)

    assert choose() == 7
    assert choose(num_moe_experts=None) == 3
    assert choose(num_moe_experts=None, mtp_num_layers=1) == 3
    assert choose(moe_aux_loss_coeff=0.0, mtp_num_layers=1) == 3  # nothing of the router's to get right, and MTP stays so
    assert choose(moe_aux_loss_coeff=[0.0, 1e-4]) == 7 and choose(moe_aux_loss_coeff=0.0, moe_z_loss_coeff=1e-3) == 7
    assert tokens_to_divide_by(SimpleNamespace(), loss_tokens=3, real_tokens=None) == 3
    with pytest.raises(ValueError, match="got real_tokens=None .* set StepMask.real"):
        tokens_to_divide_by(MOE, loss_tokens=3, real_tokens=None)


@pytest.mark.parametrize("padded", [0, 3], ids=["no padding", "padding left out"])
def test_the_routers_auxiliary_losses_are_right_with_that_number(padded):
    """megatron-core's own router: per-token losses over N = all tokens are the mean that it makes without the flag; over loss tokens too large."""
    logits = [torch.randn(8, 1, 4), torch.randn(8, 1, 4)]
    padding = [torch.zeros(8, 1, dtype=torch.bool), (torch.arange(8) >= 8 - padded)[:, None]]
    masks = [StepMask(torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0]), real=~p[:, 0]) for p in padding]
    counts = count_step(masks)
    ((plain),) = on_ranks(1, RANKS, "router_gradients", logits=logits, padding=padding, per_token=False)
    ((per_token),) = on_ranks(1, RANKS, "router_gradients", logits=logits, padding=padding, per_token=True)
    n = tokens_to_divide_by(MOE, loss_tokens=counts.rollout.tokens, real_tokens=counts.real_tokens)
    share = torch.tensor([8, 8 - padded]) / (16 - padded)  # of each micro-batch in the mean; 1/2 and 1/2 without padding
    assert n == 16 - padded and counts.rollout.tokens == 6
    for gradient, truth, weight in zip(per_token, plain, share, strict=True):
        torch.testing.assert_close(gradient / n, truth * weight)
        assert (gradient / 6).norm() > 2 * (truth * weight).norm()
    # and the loss is what it was: coefficients are made for the same N
    one, other = (coefficients(masks[0], counts, divided_by=number) / number for number in (6, n))
    torch.testing.assert_close(one, other)
