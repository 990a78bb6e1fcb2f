"""-inf and NaN log-probabilities, and rows that say nothing: the right number or a NaN that everybody sees, never a quiet finite one."""

import math

import pytest
import torch

from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs
from tests.losses.oracle import FORMULAE


def evaluate(name, logp, entropy=1.0, **inputs):
    """loss and dF/dlogp of one fp32 token."""
    logp_T = torch.tensor([logp], requires_grad=True)
    given = TokenInputs(advantage=torch.ones(1), **{k: torch.tensor([v]) for k, v in inputs.items()})
    terms = bind(name).for_vocabulary(1000)(TokenStats(logp_T, torch.tensor([entropy]), torch.tensor([0.0])), given)
    (slope,) = torch.autograd.grad(terms.loss.sum(), logp_T)
    return terms.loss.item(), slope.item()


@pytest.mark.parametrize("name", FORMULAE)
@pytest.mark.parametrize("inputs", [{}, {"old_logp": -1.0}], ids=["on_policy", "off_policy"])
def test_a_stray_label_stays_nan(name, inputs):
    for entropy in (1.0, 0.0):  # H = 0 makes eaft's weight 0, which must not swallow the NaN
        assert math.isnan(evaluate(name, math.nan, entropy, **inputs)[0])


# p = 0: a weight that is a power of p kills the term, a weight that is not leaves -log 0 = inf, as cross-entropy has it
POWERS_OF_P = ("dft", "sft_is", "gce", "chord_phi", "idft", "luffy", "cll_mask")  # the last: cll = -inf is below every threshold


@pytest.mark.parametrize("name", POWERS_OF_P)
def test_an_impossible_label_is_worth_nothing_where_p_weighs(name):
    loss, slope = evaluate(name, -math.inf)
    assert loss == 0 and slope == 0


@pytest.mark.parametrize("name, slope", [("sft", -1.0), ("eaft", -1 / math.log(1000)), ("srft_demo", -0.5 * math.exp(-1)), ("cll_sigmoid", -1.0)])
def test_an_impossible_label_is_infinite_elsewhere(name, slope):
    got = evaluate(name, -math.inf)
    assert got == (math.inf, pytest.approx(slope))


def test_grpo_of_an_impossible_label():
    assert evaluate("grpo", -math.inf, old_logp=-1.0) == (pytest.approx(-math.exp(-20)), 0.0)
    # sampled by a policy that gives it probability 0: no ratio exists, and a contradiction must show
    assert math.isnan(evaluate("grpo", -math.inf)[0])


@pytest.mark.parametrize("name", FORMULAE)
def test_a_masked_row_is_finite_before_it_is_zeroed(name):
    assert all(map(math.isfinite, evaluate(name, 0.0, entropy=0.0)))


def test_entropy_rounded_below_zero_is_zero():
    """H = ln s - t/s of a peaked row can round to -1e-7; its square root would be NaN."""
    stats = TokenStats(torch.tensor([-1e-7]), torch.tensor([-1e-7]), torch.tensor([0.0]))
    assert bind("eaft", vocab_size=1000, alpha=0.5)(stats, TokenInputs()).weight.item() == 0
