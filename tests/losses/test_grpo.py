"""GRPO's branches one by one: which ratio is kept, where the gradient stops, what is counted."""

import math

import pytest
import torch

from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs


def one(ratio, advantage, **params):
    """loss, dF/dlogp and metrics of one token with this ratio."""
    logp_T = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    inputs = TokenInputs(
        advantage=torch.tensor([advantage], dtype=torch.float64), old_logp=logp_T.detach() - math.log(ratio)
    )
    terms = bind("grpo", **params)(TokenStats(logp_T, logp_T.detach() * 0, logp_T.detach() * 0), inputs)
    terms.loss.sum().backward()
    return terms.loss.item(), logp_T.grad.item(), {k: v.item() for k, v in terms.metrics.items()}


CASES = [  # ratio, A, kept ratio, does the gradient pass
    (1.1, 2.0, 1.1, True),    # inside
    (1.3, 2.0, 1.2, False),   # A > 0 above 1 + eps: enough
    (0.5, 2.0, 0.5, True),    # A > 0 below 1 - eps: never clipped, min takes the smaller
    (1.1, -2.0, 1.1, True),
    (0.5, -2.0, 0.8, False),  # A < 0 below 1 - eps: enough
    (1.5, -2.0, 1.5, True),   # A < 0 above 1 + eps: not clipped ...
    (2.99, -2.0, 2.99, True),
    (5.0, -2.0, 3.0, False),  # ... until the dual clip
]


@pytest.mark.parametrize("ratio, A, kept, passes", CASES)
def test_clip_branches(ratio, A, kept, passes):
    loss, slope, metrics = one(ratio, A)
    assert loss == pytest.approx(-A * kept) and slope == pytest.approx(-A * ratio if passes else 0.0)
    assert metrics == {"ratio": pytest.approx(ratio), "clip_frac": 0.0 if passes else 1.0}


def test_dual_clip_can_be_off_and_asymmetric_clips_are_taken():
    assert one(5.0, -2.0, dual_clip=math.inf)[:2] == pytest.approx((10.0, 10.0))
    assert one(1.25, 1.0, clip_high=0.28)[:2] == pytest.approx((-1.25, -1.25))  # DAPO's clip-higher
    assert one(0.75, -1.0, clip_low=0.3)[:2] == pytest.approx((0.75, 0.75))


def test_gradient_passes_at_a_bound():
    """r exactly on a clip: min(rA, clip A) written with torch.minimum would halve the gradient, and clip_frac would not know."""
    for ratio, advantage, params in [(1.0, 1.0, {"clip_high": 0.0}), (1.0, -1.0, {"clip_low": 0.0})]:
        assert one(ratio, advantage, **params)[:2] == pytest.approx((-advantage, -advantage))


@pytest.mark.parametrize("ratio, kept", [(math.exp(30), math.exp(20)), (math.exp(-30), math.exp(-20))])
def test_log_ratio_is_held_to_20_nats(ratio, kept):
    loss, slope, _ = one(ratio, -1.0, clip_low=1.0, dual_clip=math.inf)
    assert loss == pytest.approx(kept) and slope == 0.0


def test_zero_advantage_learns_nothing():
    assert one(1.5, 0.0)[:2] == (0.0, 0.0)


def test_advantage_is_required_and_its_dtype_does_not_spread():
    stats = TokenStats(*torch.full((3, 4), -1.0).unbind())
    with pytest.raises(ValueError, match=r"'grpo' needs inputs.advantage"):
        bind("grpo")(stats, TokenInputs())
    assert bind("grpo")(stats, TokenInputs(advantage=torch.ones(4, dtype=torch.float64))).loss.dtype == torch.float32
    assert bind("luffy")(stats, TokenInputs(advantage=torch.ones(4, dtype=torch.float64))).loss.dtype == torch.float32


def test_without_old_logp_the_step_is_on_policy():
    logp_T = torch.tensor([-0.1, -5.0, -100.0], requires_grad=True)
    terms = bind("grpo")(TokenStats(logp_T, logp_T.detach(), logp_T.detach()), TokenInputs(advantage=torch.tensor([1.0, -2.0, 3.0])))
    terms.loss.sum().backward()
    assert terms.loss.tolist() == [-1.0, 2.0, -3.0] and logp_T.grad.tolist() == [-1.0, 2.0, -3.0]
    assert terms.metrics["ratio"].tolist() == [1.0] * 3 and terms.metrics["clip_frac"].tolist() == [0.0] * 3
