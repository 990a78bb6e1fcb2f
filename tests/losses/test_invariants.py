"""What must hold whatever the logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs
from megatron_plugin.losses.reduction import evaluate_loss
from tests.losses.oracle import DETACHED, FORMULAE, FP64, VOCAB, dense_stats, random_tokens


def gradient(loss, logits_TV, labels_T, inputs=None):
    terms = loss.for_vocabulary(logits_TV.shape[1])(dense_stats(logits_TV, labels_T), inputs or TokenInputs())
    return torch.autograd.grad(terms.loss.sum(), logits_TV)[0]


def same(got, expected):
    torch.testing.assert_close(got, expected, atol=FP64, rtol=FP64)


@st.composite
def rows(draw):
    """[T, V] fp64 logits from flat to one-hot, and labels: sizes 1 (no neighbour) and 2 to 9 (hand-checkable)."""
    T, V = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    scale = draw(st.sampled_from([1e-3, 1.0, 5.0, 30.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = scale * torch.randn(T, V, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(V, (T,), generator=g)


@settings(max_examples=30, deadline=None)
@given(rows())
def test_rows_of_the_gradient_sum_to_zero_and_weights_bound_it(tokens):
    logits_TV, labels_T = tokens
    inputs = TokenInputs(advantage=torch.linspace(-2, 2, len(labels_T), dtype=torch.float64))
    for name in FORMULAE:
        grad_TV = gradient(bind(name, entropy_bonus=0.1), logits_TV, labels_T, inputs)
        assert grad_TV.sum(-1).abs().max() < 1e-13, name
    for name in DETACHED:
        terms = bind(name).for_vocabulary(logits_TV.shape[1])(dense_stats(logits_TV, labels_T), inputs)
        assert (terms.loss >= 0).all() and (gradient(bind(name), logits_TV, labels_T).abs() <= terms.weight[:, None] + 1e-15).all(), name


@settings(max_examples=30, deadline=None)
@given(rows())
def test_dft_is_the_gradient_of_minus_p_and_chord_one_minus_p_of_it(tokens):
    logits_TV, labels_T = tokens
    stats = dense_stats(logits_TV, labels_T)
    p_T = stats.logp.exp()
    dft_TV = gradient(bind("dft"), logits_TV, labels_T)
    same(dft_TV, torch.autograd.grad(-p_T.sum(), logits_TV, retain_graph=True)[0])
    same(gradient(bind("chord_phi"), logits_TV, labels_T), (1 - p_T.detach())[:, None] * dft_TV)
    assert torch.equal(gradient(bind("sft_is"), logits_TV, labels_T), dft_TV)
    assert (bind("dft")(stats, TokenInputs()).loss <= bind("sft")(stats, TokenInputs()).loss).all()


@settings(max_examples=30, deadline=None)
@given(rows(), st.floats(0.1, 3))
def test_idft_and_gce_at_their_corners(tokens, gamma):
    logits_TV, labels_T = tokens
    sft_TV, dft_TV = (gradient(bind(name), logits_TV, labels_T) for name in ("sft", "dft"))
    same(gradient(bind("idft", gamma_min=1, gamma_max=1), logits_TV, labels_T), dft_TV)
    same(gradient(bind("idft", ramp=0), logits_TV, labels_T), dft_TV)  # the ramp starts at DFT, not at SFT
    same(gradient(bind("idft", gamma_min=0, gamma_max=0), logits_TV, labels_T), sft_TV)
    same(gradient(bind("gce", gamma=0), logits_TV, labels_T), sft_TV)
    same(gradient(bind("gce", gamma=1), logits_TV, labels_T), dft_TV)
    p_T = dense_stats(logits_TV, labels_T).logp.exp()
    (gce_TV,) = torch.autograd.grad(((1 - p_T**gamma) / gamma).sum(), logits_TV)
    torch.testing.assert_close(gradient(bind("gce", gamma=gamma), logits_TV, labels_T), gce_TV, atol=1e-14, rtol=1e-12)


def test_idft_leans_to_sft_for_likely_tokens_and_below_dft_for_surprising_ones():
    stats = TokenStats(torch.tensor([-0.2, -1.0, -3.0]), torch.tensor([1.0, 1.0, 1.0]), torch.zeros(3))  # cll +0.8, 0, -2
    idft, dft = (bind(name)(stats, TokenInputs()).weight for name in ("idft", "dft"))
    assert idft[0] > dft[0] and idft[1] == pytest.approx(dft[1].item(), rel=1e-6) and idft[2] < dft[2]


def test_chord_weight_is_symmetric_about_one_half_and_at_most_a_quarter():
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    weight = bind("chord_phi")(TokenStats(p.log(), p * 0, p * 0), TokenInputs()).weight
    torch.testing.assert_close(weight, weight.flip(0), atol=1e-15, rtol=1e-12)
    assert weight.max().item() == pytest.approx(0.25, abs=1e-15) and weight.argmax() == 499
    edges = torch.tensor([-745.0, 0.0], dtype=torch.float64)
    assert bind("chord_phi")(TokenStats(edges, edges * 0, edges * 0), TokenInputs()).weight.abs().max() < 1e-300


def test_strictly_on_policy_grpo_is_a_policy_gradient_and_ppo_with_advantage_one_is_sft():
    logits_TV, labels_T, inputs = random_tokens()
    sft_TV = gradient(bind("sft"), logits_TV, labels_T)  # -(e - p)
    same(gradient(bind("grpo"), logits_TV, labels_T, TokenInputs(advantage=inputs.advantage)), inputs.advantage[:, None] * sft_TV)
    same(gradient(bind("grpo"), logits_TV, labels_T, TokenInputs(advantage=torch.ones(64))), sft_TV)
    same(gradient(bind("grpo"), logits_TV, labels_T, TokenInputs(advantage=-torch.ones(64))), -sft_TV)  # SRFT's own wrong answers


def test_srft_and_luffy_limits():
    logits_TV, labels_T, _ = random_tokens()
    stats = dense_stats(logits_TV, labels_T)
    sure = stats._replace(entropy=torch.zeros_like(stats.entropy))
    for sign in (-1, 1):
        assert (bind("srft_demo", entropy_sign=sign)(sure, TokenInputs()).weight == 0.5).all()
    A_T = torch.linspace(-1, 1, 64, dtype=torch.float64)
    wide = bind("luffy", gamma=1e9)(stats, TokenInputs(advantage=A_T)).loss * 1e9
    torch.testing.assert_close(wide, -A_T * stats.logp.exp(), atol=0, rtol=2e-9)
    assert gradient(bind("luffy", gamma=1e-15), logits_TV, labels_T).abs().max() < 1e-10
    ones = TokenInputs(advantage=torch.ones(64))
    assert torch.equal(gradient(bind("luffy"), logits_TV, labels_T), gradient(bind("luffy"), logits_TV, labels_T, ones))


def test_one_hot_row_and_forbidden_columns():
    """A -inf column adds nothing to H and gets no gradient; a row with all mass on the label has H = 0 and nothing to learn."""
    logits_TV = torch.tensor([[0.0, float("-inf"), float("-inf")], [1.0, 0.0, float("-inf")]], dtype=torch.float64, requires_grad=True)
    labels_T = torch.tensor([0, 1])
    assert dense_stats(logits_TV, labels_T).entropy[0] == 0
    for name in FORMULAE:
        grad_TV = gradient(bind(name, entropy_bonus=0.1), logits_TV, labels_T, TokenInputs(advantage=torch.ones(2)))
        assert grad_TV.isfinite().all() and not grad_TV[0].any() and grad_TV[1, 2] == 0, name


def test_mixture_is_linear_in_mu():
    """CHORD's (1 - mu) L_GRPO + mu L_SFT comes in through the coefficient; at mu = 0 it is bitwise GRPO."""
    logits_TV, labels_T, inputs = random_tokens()
    stats, live = dense_stats(logits_TV, labels_T), torch.ones(64, dtype=torch.bool)

    def total(name, share):
        given = TokenInputs(advantage=inputs.advantage, old_logp=inputs.old_logp, coefficient=torch.full((64,), share))
        return evaluate_loss(bind(name), stats, given, live).loss_sum

    def mixed(mu):
        return total("grpo", 1 - mu) + total("chord_phi", mu)

    assert torch.equal(mixed(0.0), total("grpo", 1.0))
    torch.testing.assert_close(mixed(0.25), 0.75 * mixed(0.0) + 0.25 * mixed(1.0), atol=1e-13, rtol=1e-13)


def test_expectations_over_the_models_own_tokens():
    """Summed exactly over every label: E[cll] = 0, E[SFT gradient] = 0, and DFT's is -1/2 of the gradient of sum p^2 (why it sharpens)."""
    row_V = random_tokens(T=1)[0].detach()[0]
    logits_TV = row_V.expand(VOCAB, VOCAB).clone().requires_grad_()
    labels_T = torch.arange(VOCAB)
    stats, p_T = dense_stats(logits_TV, labels_T), row_V.softmax(0)
    assert (p_T * (stats.logp + stats.entropy)).sum().abs() < 1e-14
    assert (p_T[:, None] * gradient(bind("sft"), logits_TV, labels_T)).sum(0).abs().max() < 1e-14
    row_V = row_V.clone().requires_grad_()
    (sharpness_V,) = torch.autograd.grad(row_V.softmax(0).square().sum(), row_V)
    same((p_T[:, None] * gradient(bind("dft"), logits_TV, labels_T)).sum(0), -0.5 * sharpness_V)
