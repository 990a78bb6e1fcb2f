"""KL to the reference and weights for rollout-trainer mismatch: their numbers, their limits, what they refuse, and whose twin they end."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from megatron_plugin.losses import LOSSES
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenStats
from megatron_plugin.losses.kl import kl_estimate
from megatron_plugin.losses.mismatch import mismatch_weight
from megatron_plugin.losses.objective import objective_of
from megatron_plugin.losses.rollout_options import OPTIONS
from megatron_plugin.ops import token_loss
from tests.losses.oracle import FORMULAE


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def slope(fn, x_T):
    x_T = x_T.clone().requires_grad_()
    return torch.autograd.grad(fn(x_T).sum(), x_T)[0]


# ---- KL -----------------------------------------------------------------------------------------------------------------------------

HAND = {  # log p = ln 1/2 against log p_ref = ln 1/4: x = ln 2.  estimator -> value, derivative
    "k1": (math.log(2), 1.0),
    "k2": (math.log(2) ** 2 / 2, math.log(2)),
    "k3": (0.5 - 1 + math.log(2), 0.5),
    "k1+": (math.log(2), math.log(2)),
    "k3+": (0.5 - 1 + math.log(2), math.log(2)),
}


@pytest.mark.parametrize("estimator", HAND)
def test_kl_by_hand(estimator):
    logp_T, ref_T = column(math.log(0.5)), column(math.log(0.25))
    value, derivative = HAND[estimator]
    assert kl_estimate(logp_T, ref_T, estimator).item() == pytest.approx(value, abs=1e-15)
    assert slope(lambda x: kl_estimate(x, ref_T, estimator), logp_T).item() == pytest.approx(derivative, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative_and_keeps_its_small_values(dtype):
    """e^x - 1 - x with exp(x) - 1 in fp32 is -6e-8 .. 6e-8 where it should be 5e-9."""
    x_T = torch.cat([torch.linspace(-19, 19, 4001), torch.logspace(-8, 0, 801), -torch.logspace(-8, 0, 801)]).to(dtype)
    value_T = kl_estimate(-x_T, torch.zeros_like(x_T), "k3")
    assert (value_T >= 0).all()
    small = x_T.abs() < 1e-3
    bound = 1e-3 if dtype == torch.float32 else 1e-6
    far = small & (x_T.abs() > 2e-4)
    torch.testing.assert_close(value_T[far], x_T[far] ** 2 / 2 + x_T[far] ** 3 / 6, rtol=bound, atol=0)


def test_which_kl_each_estimator_descends():
    """Summed exactly over every token of p: k2's gradient is that of KL(p || q), k1's is 0, k3's that of KL(q || p)."""
    p_V, q_V = column(0.5, 0.3, 0.2), column(0.2, 0.3, 0.5)
    logits_V = p_V.log().requires_grad_()

    def average(estimator):
        logp_V = logits_V.log_softmax(0)
        inner_V = torch.autograd.grad(kl_estimate(logp_V, q_V.log(), estimator).sum(), logp_V)[0]
        return torch.autograd.grad((p_V * inner_V * logits_V.log_softmax(0)).sum(), logits_V)[0]

    def exact(divergence):
        return torch.autograd.grad(divergence(logits_V.log_softmax(0)), logits_V)[0]

    reverse = exact(lambda logp_V: (logp_V.exp() * (logp_V - q_V.log())).sum())
    forward = exact(lambda logp_V: (q_V * (q_V.log() - logp_V)).sum())
    for estimator, truth in (("k1", 0 * reverse), ("k2", reverse), ("k1+", reverse), ("k3+", reverse), ("k3", forward)):
        torch.testing.assert_close(average(estimator), truth, atol=1e-15, rtol=0, msg=estimator)
    values = {name: (p_V * kl_estimate(p_V.log(), q_V.log(), name)).sum().item() for name in ("k1", "k3")}
    truth = (p_V * (p_V / q_V).log()).sum().item()
    assert values == {"k1": pytest.approx(truth), "k3": pytest.approx(truth)}, "unbiased values"


def test_k3_of_impossible_tokens_is_finite():
    """p underflows against the reference, and the other way round: e^20, then no gradient."""
    logp_T, ref_T = column(-200.0, -1.0), column(-1.0, -200.0)
    assert kl_estimate(logp_T, ref_T, "k3").tolist() == pytest.approx([math.expm1(20) - 20, math.expm1(-20) + 20], rel=1e-12)
    assert slope(lambda x: kl_estimate(x, ref_T, "k3"), logp_T).tolist() == [0.0, 0.0]


# ---- rollout-trainer mismatch -------------------------------------------------------------------------------------------------------

RATIO = column(0.25, 0.5, 1.0, 2.0, 4.0)


@pytest.mark.parametrize("bounds, expected", [
    ({}, [0.25, 0.5, 1, 2, 4]),
    ({"tis": 2.0}, [0.25, 0.5, 1, 2, 2]),
    ({"icepop_low": 0.5, "icepop_high": 2.0}, [0, 0.5, 1, 2, 0]),  # on the border is inside
    ({"icepop_low": 0.5, "tis": 1.5}, [0, 0.5, 1, 1.5, 1.5]),
    ({"icepop_high": 3.0, "tis": 1.5}, [0.25, 0.5, 1, 1.5, 0]),
])  # fmt: skip
def test_mismatch_weights_by_hand(bounds, expected):
    old_T = torch.zeros(5, dtype=torch.float64)
    weight_T, cut_T = mismatch_weight(old_T, -RATIO.log2() * math.log(2), **bounds)
    ratio_T = (RATIO.log2() * math.log(2)).exp()
    near_T = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(weight_T, near_T, atol=1e-15, rtol=1e-15)
    assert torch.equal(cut_T, (weight_T != ratio_T).double())


def test_a_weight_is_capped_and_a_missing_logp_shows():
    old_T, rolled_T = column(-1.0, -1.0, math.nan, -math.inf), column(-90.0, math.nan, -1.0, -1.0)
    for bounds in ({"tis": 2.0}, {"icepop_low": 0.5, "icepop_high": 2.0}):
        weight_T, _ = mismatch_weight(old_T, rolled_T, **bounds)
        assert weight_T[0] == (2 if "tis" in bounds else 0) and weight_T[1:3].isnan().all() and weight_T[3] < 1e-8


def test_three_policies_stay_distinct():
    """p / p_old is clipped and differentiated, p_old / p_rollout is neither; one in the other's place changes loss or gradient."""
    logp_T = column(-1.0).requires_grad_()
    inputs = TokenInputs(advantage=column(2.0), old_logp=column(-1.1), rollout_logp=column(-1.4))
    terms = bind("grpo", tis=10.0)(TokenStats(logp_T, logp_T.detach(), logp_T.detach()), inputs)
    (got,) = torch.autograd.grad(terms.loss, logp_T)
    assert terms.loss.item() == pytest.approx(-2 * math.exp(0.1) * math.exp(0.3)) and got.item() == pytest.approx(terms.loss.item())
    assert terms.metrics["ratio"].item() == pytest.approx(math.exp(0.1)) and terms.metrics["mismatch"].item() == pytest.approx(math.exp(0.3))


def test_the_kl_is_not_multiplied_by_the_mismatch():
    logp_T = column(-1.0, -1.0)
    inputs = TokenInputs(advantage=column(0.0, 0.0), old_logp=logp_T, rollout_logp=logp_T - 3, ref_logp=logp_T - 1)
    terms = bind("grpo", kl=0.5, kl_estimator="k1", icepop_high=2.0)(TokenStats(logp_T, logp_T, logp_T), inputs)
    assert terms.loss.tolist() == [0.5, 0.5] and terms.metrics["mismatch"].tolist() == [0.0, 0.0] and terms.metrics["kl"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", sorted(name for name, loss in LOSSES.items() if "tis" in inspect.signature(loss.fn).parameters))
def test_options_at_their_defaults_are_not_there(name):
    """No input is asked for, no metric reported, and the loss is bitwise the one without them."""
    logp_T = column(-1.0, -2.0, -0.3)
    stats = TokenStats(logp_T, logp_T + 3, logp_T)
    inputs = TokenInputs(advantage=column(1.0, -1.0, 0.5), old_logp=logp_T - 0.1, expert=torch.tensor([False, True, False]),
                         extra={"reward": column(1.0, 1.0, 0.0), "sequence": column(0.0, 0.0, 1.0)})  # fmt: skip
    plain = bind(name)(stats, inputs)
    neutral = bind(name, kl=0.0, kl_estimator="k2", tis=math.inf, icepop_low=0.0, icepop_high=math.inf)(stats, inputs)
    assert torch.equal(plain.loss, neutral.loss) and list(plain.metrics) == list(neutral.metrics)
    full = replace(inputs, rollout_logp=logp_T - 0.2, ref_logp=logp_T + 0.3)
    for option in ({"kl": 0.1}, {"tis": 1.01}, {"icepop_low": 1.2}, {"icepop_high": 0.9}):
        assert not torch.equal(bind(name, **option)(stats, full).loss, plain.loss), option


def test_the_signature_shows_the_options():
    parameters = inspect.signature(LOSSES["grpo"].fn).parameters
    assert list(parameters) == ["stats", "inputs", "clip_low", "clip_high", "dual_clip", *OPTIONS]
    assert str(parameters["kl_estimator"]) == "kl_estimator: 'str' = 'k3'" and LOSSES["grpo"].fn.__doc__.startswith("GRPO")


# ---- the twin of grpo ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params, has_twin", [
    ({}, True),
    ({"clip_low": 0.1, "clip_high": 0.28, "dual_clip": math.inf}, True),
    ({"clip_high": torch.tensor(0.28)}, True),
    ({"kl": 0.0, "tis": math.inf, "kl_estimator": "k3"}, True),
    ({"kl": 0.1}, False),
    ({"kl": torch.tensor(0.0)}, False),  # its value is not read
    ({"tis": 2.0}, False),
    ({"icepop_low": 0.5}, False),
    ({"icepop_high": 5.0}, False),
])  # fmt: skip
def test_the_twin_is_used_only_for_its_own_formula(params, has_twin):
    inputs = TokenInputs(**{name: torch.ones(3) for name in ("coefficient", "advantage", "old_logp", "rollout_logp", "ref_logp")})
    objective, metrics = objective_of(bind("grpo", **params), inputs)
    assert (objective.twin is not None) == has_twin
    if has_twin:
        assert objective.twin.params == (params.get("clip_low", 0.2), params.get("clip_high", 0.2), params.get("dual_clip", 3.0))
        assert objective.twin.metrics == len(metrics) == 2


def test_only_losses_of_one_formula_have_a_twin():
    assert {name for name, loss in LOSSES.items() if loss.twin} == set(FORMULAE)


# ---- bf16 engine, fp32 trainer --------------------------------------------------------------------------------------------------------


def test_tis_takes_the_engines_rounding_out_of_the_expected_gradient():
    """Every token of a vocabulary of 512, once, with the probability that a bf16 engine samples it with as its coefficient: no sampling noise."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(512)).requires_grad_()
    advantage, tokens = torch.randn(512), torch.arange(512)
    trainer, engine = (x.double().log_softmax(-1) for x in (logits.detach(), logits.detach().bfloat16()))

    def gradient(drawn_with, **params):
        inputs = TokenInputs(coefficient=drawn_with.exp().float(), advantage=advantage, rollout_logp=engine.float())
        loss_sum = token_loss(logits.expand(512, 512), tokens, bind("grpo", **params), inputs=inputs).loss_sum
        return torch.autograd.grad(loss_sum, logits)[0].double()

    true = gradient(trainer)
    without, corrected = ((gradient(engine, **params) - true).norm() / true.norm() for params in ({}, {"tis": 2.0}))
    assert without > 1e-3  # measured 3.6e-3
    assert corrected < 4e-8  # measured 7.3e-9
