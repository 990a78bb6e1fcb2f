"""CHORD: each token one source's term, the two never touch, and the corners mu = 0 and mu = 1."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_plugin import Plan, linear_token_loss, linear_token_stats, token_loss
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.chord import EXPERT_TERM
from megatron_plugin.losses.contract import TokenInputs, TokenStats
from megatron_plugin.losses.reduction import evaluate_loss
from tests import tolerances as tol
from tests.losses.oracle import dense_stats
from tests.losses.policy_oracle import policy_tokens

OPTIONS = {"kl": 0.1, "tis": 1.5, "clip_high": 0.28}


def graded(name, stats, inputs, **params):
    terms = bind(name, **params)(stats, inputs)
    (slope_T,) = torch.autograd.grad(terms.loss.sum(), stats.logp, retain_graph=True)
    return terms, slope_T


def tokens():
    logits_TV, labels_T, inputs = policy_tokens(64)
    detached = [x.detach().requires_grad_() for x in dense_stats(logits_TV, labels_T)]
    return TokenStats(*detached), inputs


@pytest.mark.parametrize("preset, expert", [("mu", "sft"), ("phi", "chord_phi"), ("is", "dft"), ("shipped", "chord_phi"), ("trinity", "chord_phi")])
def test_every_token_has_the_term_of_its_source_bit_for_bit(preset, expert):
    stats, inputs = tokens()
    (mixed, slope_T), (taught, taught_T), (policy, policy_T) = (
        graded("chord", stats, inputs, preset=preset, **OPTIONS), graded(expert, stats, inputs), graded("grpo", stats, inputs, **OPTIONS)
    )  # fmt: skip
    own_T = ~inputs.expert
    assert 10 < own_T.sum() < 54
    assert torch.equal(mixed.loss, torch.where(own_T, policy.loss, taught.loss)) and torch.equal(slope_T, torch.where(own_T, policy_T, taught_T))
    weight_T = 1.0 if taught.weight is None else taught.weight
    assert torch.equal(mixed.weight, torch.where(own_T, policy.metrics["mismatch"], weight_T))


def test_metrics_belong_to_their_source():
    """Summed over all live tokens they are the sums over their own source: the other's rows hold exactly 0."""
    stats, inputs = tokens()
    mixed, policy = bind("chord", **OPTIONS)(stats, inputs), bind("grpo", **OPTIONS)(stats, inputs)
    assert list(mixed.metrics) == ["expert/phi", "rollout/ratio", "rollout/clip_frac", "rollout/mismatch", "rollout/mismatch_cut", "rollout/kl"]
    phi_T = mixed.metrics["expert/phi"]
    assert not phi_T[~inputs.expert].any() and torch.equal(phi_T[inputs.expert], mixed.weight[inputs.expert])
    for name in ("ratio", "clip_frac", "mismatch", "mismatch_cut", "kl"):
        column_T = mixed.metrics[f"rollout/{name}"]
        assert not column_T[inputs.expert].any() and torch.equal(column_T[~inputs.expert], policy.metrics[name][~inputs.expert]), name


def reduced(loss, stats, inputs, coefficient_T):
    out = evaluate_loss(loss, stats, with_coefficient(inputs, coefficient_T), coefficient_T != 0)
    return out.loss_sum, torch.stack(torch.autograd.grad(out.loss_sum, stats, retain_graph=True, materialize_grads=True)), out


def with_coefficient(inputs, coefficient_T):
    plain = {name: x for name, x in inputs.tensors().items() if not name.startswith("extra.")}
    return TokenInputs(**(plain | {"coefficient": coefficient_T}))


def shares(inputs, mu):
    expert_T = inputs.expert.double()
    return mu * expert_T + (1 - mu) * (1 - expert_T)


def test_mu_zero_is_grpo_and_mu_one_is_the_expert_loss_bit_for_bit():
    stats, inputs = tokens()
    for mu, other in ((0.0, "grpo"), (1.0, "chord_phi")):
        share_T = shares(inputs, mu)
        mixed, alone = reduced(bind("chord"), stats, inputs, share_T), reduced(bind(other), stats, inputs, share_T)
        assert torch.equal(mixed[0], alone[0]) and torch.equal(mixed[1], alone[1]) and mixed[2].num_tokens == alone[2].num_tokens
        assert not mixed[1][:, share_T == 0].any()


def test_the_mixture_is_linear_in_mu_with_two_denominators():
    """mu / N_expert and (1 - mu) / N_rollout: the gradient is mu times the one loss's mean plus 1 - mu times the other's."""
    stats, inputs = tokens()
    own_T = ~inputs.expert
    mean_T = torch.where(own_T, own_T.sum(), inputs.expert.sum()).double().reciprocal()

    def gradient(loss, scale_T):
        return reduced(bind(loss), stats, inputs, scale_T * mean_T)[1]

    only_expert_T, only_own_T = inputs.expert.double(), own_T.double()
    for mu in (0.1, 0.5):
        mixed = gradient("chord", shares(inputs, mu))
        apart = mu * gradient("chord_phi", only_expert_T) + (1 - mu) * gradient("grpo", only_own_T)
        torch.testing.assert_close(mixed, apart, atol=1e-17, rtol=1e-14)


@pytest.mark.parametrize("first_update", [False, True])
def test_what_was_never_sampled_does_not_matter(first_update):
    """Expert rows carry NaN for advantage, old_logp, rollout_logp and ref_logp (policy_tokens); infinities and other numbers do as little.

    At the first update there is no old_logp, whose NaN would end in a clamp that has no gradient there: the advantage's NaN goes on.
    """
    stats, inputs = tokens()
    inputs = replace(inputs, old_logp=None) if first_update else inputs
    expected, expected_T = graded("chord", stats, inputs, **OPTIONS)
    assert expected.loss.isfinite().all() and expected_T.isfinite().all()
    for filling in (math.inf, -math.inf, 3.0):
        def fill(x, filling=filling):
            return torch.where(inputs.expert, filling, x) if x.is_floating_point() else x

        got, slope_T = graded("chord", stats, inputs.map(fill), **OPTIONS)
        assert torch.equal(got.loss, expected.loss) and torch.equal(slope_T, expected_T)


def test_a_stray_label_stays_nan_in_both_sources():
    logp_T = torch.tensor([math.nan, math.nan, -1.0], requires_grad=True)
    inputs = TokenInputs(expert=torch.tensor([True, False, True]), advantage=torch.ones(3), rollout_logp=torch.full((3,), -1.0))
    for params in ({}, {"preset": "is"}, {"icepop_low": 0.5, "icepop_high": 2.0}):
        loss_T = bind("chord", **params)(TokenStats(logp_T, logp_T.detach() * 0, logp_T.detach() * 0), inputs).loss
        assert loss_T.isnan().tolist() == [True, True, False]


def test_expert_and_advantage_are_required():
    stats, inputs = tokens()
    with pytest.raises(ValueError, match=r"'chord' needs inputs.expert .* pass inputs=TokenInputs\(expert="):
        bind("chord")(stats, TokenInputs(advantage=inputs.advantage))
    with pytest.raises(ValueError, match="'chord' needs inputs.advantage"):
        bind("chord")(stats, TokenInputs(expert=inputs.expert))
    with pytest.raises(ValueError, match="'chord' needs inputs.rollout_logp"):
        bind("chord", tis=2.0)(stats, TokenInputs(expert=inputs.expert, advantage=inputs.advantage))
    with pytest.raises(ValueError, match="'chord' needs inputs.ref_logp"):
        bind("chord", kl=0.1)(stats, TokenInputs(expert=inputs.expert, advantage=inputs.advantage))


@pytest.mark.parametrize("preset", ["mu", "phi", "is"])
@pytest.mark.parametrize("way", ["hidden", "logits"])
def test_one_pass_is_two_pass(way, preset):
    """The gradient formed inside the forward, chunks of 8 of 30 tokens with both sources in each, against the one of the backward."""
    g = torch.Generator().manual_seed(5)
    hidden, weight, labels = torch.randn(30, 16, generator=g), torch.randn(50, 16, generator=g), torch.randint(50, (30,), generator=g)
    _, _, inputs = policy_tokens(30, dtype=torch.float32)
    inputs = with_coefficient(inputs, torch.where(inputs.expert, 0.02, 0.07))
    loss, live = bind("chord", preset=preset, entropy_bonus=0.01, **OPTIONS), torch.ones(30, dtype=torch.bool)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    stats = linear_token_stats(*leaves, labels)
    truth = evaluate_loss(loss, stats, inputs, live)
    expected = torch.autograd.grad(truth.loss_sum, leaves)
    if way == "hidden":
        out = linear_token_loss(*leaves, labels, loss, inputs=inputs, plan=Plan(chunk_tokens=8))
    else:
        out = token_loss(leaves[0] @ leaves[1].t(), labels, loss, inputs=inputs)
    torch.testing.assert_close(out.loss_sum, truth.loss_sum, atol=tol.LOSS_SUM, rtol=tol.LOSS_SUM)
    for got, gradient in zip(torch.autograd.grad(out.loss_sum, leaves), expected, strict=True):
        assert torch.linalg.vector_norm(got - gradient) <= tol.LINEAR_GRAD * torch.linalg.vector_norm(gradient)
    assert list(out.metric_sums) == list(truth.metric_sums)
    for name, total in truth.metric_sums.items():
        torch.testing.assert_close(out.metric_sums[name], total, atol=30 * tol.LOSS_SUM, rtol=tol.LOSS_SUM, msg=name)


def test_presets_have_both_spellings():
    assert all(EXPERT_TERM[f"chord_{name}"] is EXPERT_TERM[name] for name in ("mu", "phi", "is"))
