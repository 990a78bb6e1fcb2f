"""Every loss with rollouts and every option against its formula, its derivative by hand and by finite differences; whose inputs matter where."""

import inspect
import math

import pytest
import torch

from megatron_plugin.losses import LOSSES
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenStats
from tests.losses.oracle import FP32_LOSS, FP64, dense_stats, dlogits
from tests.losses.policy_oracle import FORMULAE, all_own, expected, frozen_sum, policy_tokens

OPTIONS = {
    "kl": {"kl": 0.3},
    "k1": {"kl": 0.3, "kl_estimator": "k1"},
    "k2": {"kl": 0.3, "kl_estimator": "k2"},
    "k1+": {"kl": 0.3, "kl_estimator": "k1+"},
    "k3+": {"kl": 0.3, "kl_estimator": "k3+"},
    "tis": {"tis": 1.3},
    "icepop": {"icepop_low": 0.5, "icepop_high": 2.0},
    "all": {"kl": 0.1, "tis": 1.5, "icepop_low": 0.3},
}
VARIANTS = [
    *((name, {}) for name in FORMULAE),
    *((name, options) for name in ("grpo", "chord") for options in OPTIONS.values()),
    *((name, OPTIONS["all"]) for name in ("cispo", "gspo", "srft")),
    *(("chord", {"preset": preset}) for preset in ("mu", "is", "shipped", "trinity", "chord_mu", "chord_phi", "chord_is")),
    ("chord", {"preset": "is", "clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.5}),
    ("cispo", {"clip_low": 0.2, "clip_high": 0.2}),
    ("gspo", {"clip_low": 0.1, "clip_high": 0.2}),
    ("srft", {"preset": "code"}),
    ("srft", {"preset": "code", "gamma": 0.5, "clip_low": 1.0, "clip_high": math.inf, "dual_clip": math.inf, **OPTIONS["all"]}),
    ("srft", {"wrong_floor": -2.0, "max_entropy": 0.7}),
    ("srft", {"preset": "code", "entropy_scope": "sequence", "max_entropy": 1.0}),
    ("srft", {"entropy_scope": "batch", "wrong_floor": -math.inf}),
]
IDS = [" ".join([name, *(f"{k}={v}" for k, v in params.items())]) for name, params in VARIANTS]
STEP, NUMERIC = 1e-5, 1.5e-9  # central differences of fp64 sums at this step, absolute and relative; measured 3.6e-10 (cispo)


def case(name, T=96):
    logits_TV, labels_T, inputs = policy_tokens(T)
    return logits_TV, labels_T, inputs if name in ("chord", "srft") else all_own(inputs)


def test_every_loss_with_rollouts_is_listed():
    assert {name for name, loss in LOSSES.items() if "tis" in inspect.signature(loss.fn).parameters} == set(FORMULAE)


@pytest.mark.parametrize("name, params", VARIANTS, ids=IDS)
def test_value_and_gradient_are_the_formula(name, params):
    logits_TV, labels_T, inputs = case(name)
    stats = dense_stats(logits_TV, labels_T)
    terms = bind(name, **params)(stats, inputs)
    F_T, a_T = expected(name, stats, inputs, **params)
    torch.testing.assert_close(terms.loss, F_T, atol=FP64, rtol=FP64)
    (grad_TV,) = torch.autograd.grad(terms.loss.sum(), logits_TV)
    torch.testing.assert_close(grad_TV, dlogits(logits_TV, labels_T, a_T, 0 * a_T), atol=FP64, rtol=FP64)
    for column in (terms.weight, *terms.metrics.values()):
        assert column is None or (column.isfinite().all() and not column.requires_grad)


@pytest.mark.parametrize("name, params", VARIANTS, ids=IDS)
def test_gradient_is_that_of_the_frozen_value(name, params):
    """Finite differences of the formula with everything stopped held at its value: through the logits, row by row."""
    logits_TV, labels_T, inputs = case(name, T=24)
    stats = dense_stats(logits_TV, labels_T)
    (grad_TV,) = torch.autograd.grad(bind(name, **params)(stats, inputs).loss.sum(), logits_TV, retain_graph=True)
    total, z_TV = frozen_sum(name, stats, inputs, **params), logits_TV.detach()
    numeric_TV = torch.zeros_like(z_TV)
    for t in range(0, 24, 3):
        for v in range(z_TV.shape[1]):
            sides = []
            for step in (STEP, -STEP):
                moved_TV = z_TV.clone()
                moved_TV[t, v] += step
                sides.append(total(dense_stats(moved_TV, labels_T).logp))
            numeric_TV[t, v] = (sides[0] - sides[1]) / (2 * STEP)
    torch.testing.assert_close(grad_TV[::3], numeric_TV[::3], atol=NUMERIC, rtol=NUMERIC)


@pytest.mark.parametrize("name, params", VARIANTS, ids=IDS)
def test_tensor_parameters_give_the_same(name, params):
    logits_TV, labels_T, inputs = case(name, T=24)
    stats = dense_stats(logits_TV, labels_T)
    tensors = {k: v if isinstance(v, str) else torch.tensor(v, dtype=torch.float64) for k, v in params.items()}
    torch.testing.assert_close(bind(name, **tensors)(stats, inputs).loss, bind(name, **params)(stats, inputs).loss, atol=FP64, rtol=FP64)
    narrow = {k: v if isinstance(v, str) else v.float() for k, v in tensors.items()}
    assert bind(name, **narrow)(stats, inputs).loss.dtype == torch.float64


@pytest.mark.parametrize("name, params", VARIANTS, ids=IDS)
def test_fp32_is_fp32_accurate(name, params):
    logits_TV, labels_T, inputs = case(name, T=256)
    single = TokenStats(*(x.detach().float() for x in dense_stats(logits_TV, labels_T)))
    inputs = inputs.map(lambda x: x.float() if x.is_floating_point() else x)
    terms = bind(name, **params)(single, inputs)
    assert terms.loss.dtype == torch.float32
    bound = 1.5 * FP32_LOSS  # e^(log-ratio) of two rounded log-probabilities; measured 1.4e-7 (grpo with its KL)
    torch.testing.assert_close(terms.loss.double(), expected(name, single, inputs, **params)[0], atol=bound, rtol=bound)


@pytest.mark.parametrize("name, params", VARIANTS, ids=IDS)
def test_without_old_logp_the_step_is_on_policy(name, params):
    logits_TV, labels_T, inputs = case(name, T=24)
    stats = dense_stats(logits_TV, labels_T)
    given = {k: x for k, x in inputs.tensors().items() if not k.startswith("extra.") and k != "old_logp"}
    F_T, a_T = expected(name, stats, TokenInputs(**given, extra=inputs.extra), **params)
    terms = bind(name, **params)(stats, TokenInputs(**given, extra=inputs.extra))
    torch.testing.assert_close(terms.loss, F_T, atol=FP64, rtol=FP64)
    (grad_TV,) = torch.autograd.grad(terms.loss.sum(), logits_TV)
    torch.testing.assert_close(grad_TV, dlogits(logits_TV, labels_T, a_T, 0 * a_T), atol=FP64, rtol=FP64)
