"""CISPO and GSPO: a gradient that never stops, and a ratio of the whole sequence."""

import math

import pytest
import torch

from megatron_plugin import TokenInputs, token_loss
from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.reduction import evaluate_loss
from tests.losses.oracle import dense_stats
from tests.losses.policy_oracle import all_own, policy_tokens

T = 40


def graded(name, logp_T, inputs, **params):
    logp_T = logp_T.detach().clone().requires_grad_()
    terms = bind(name, **params)(TokenStats(logp_T, logp_T.detach(), logp_T.detach()), inputs)
    return terms, torch.autograd.grad(terms.loss.sum(), logp_T)[0]


def tokens():
    logits_TV, labels_T, inputs = policy_tokens(T)
    return dense_stats(logits_TV.detach(), labels_T).logp, all_own(inputs)


def test_cispo_gradient_is_never_zero():
    """Where GRPO has clipped more than a quarter of the tokens away."""
    logp_T, inputs = tokens()
    for params in ({}, {"clip_low": 0.2, "clip_high": 0.2}):
        _, slope_T = graded("cispo", logp_T, inputs, **params)
        assert (slope_T != 0).all()
    assert (graded("grpo", logp_T, inputs)[1] == 0).float().mean() > 0.25


def test_cispo_by_hand():
    inputs = TokenInputs(advantage=torch.tensor([1.0, 1.0, -2.0]), old_logp=torch.tensor([-2.0, -0.5, -3.0]))
    terms, slope_T = graded("cispo", torch.tensor([-1.0, -1.0, -1.0]), inputs, clip_low=0.2, clip_high=0.2)
    assert terms.loss.tolist() == pytest.approx([1.2, 0.8, -2.4]) and slope_T.tolist() == pytest.approx([-1.2, -0.8, 2.4])
    assert terms.weight.tolist() == pytest.approx([1.2, 0.8, -2.4]) and terms.metrics["clip_frac"].tolist() == [1, 1, 1]
    assert terms.metrics["ratio"].tolist() == pytest.approx([math.e, math.exp(-0.5), math.exp(2)])
    wide, _ = graded("cispo", torch.tensor([-1.0, -1.0, -1.0]), inputs)
    assert wide.weight.tolist() == pytest.approx([math.e, math.exp(-0.5), -10.0]), "by default only the ratio above 5 is held"


def test_on_policy_both_are_the_policy_gradient():
    logp_T, inputs = tokens()
    given = TokenInputs(advantage=inputs.advantage, extra=inputs.extra)
    for name in ("cispo", "gspo"):
        torch.testing.assert_close(graded(name, logp_T, given)[1], -inputs.advantage, atol=1e-15, rtol=0)


def sequence_inputs(inputs, **changes):
    fields = {"advantage": inputs.advantage, "old_logp": inputs.old_logp, "extra": {"sequence": inputs.extra["sequence"]}}
    return TokenInputs(**fields | changes)


@pytest.mark.parametrize("clips", [{"clip_low": 1.0, "clip_high": math.inf}, {"clip_low": 0.05, "clip_high": 0.05}], ids=["open", "clipped"])
def test_gspo_is_the_gradient_of_the_sequence_objective(clips):
    """With 1 / |y| on every token: autograd of -min(s A, clip(s) A), summed over sequences, with nothing stopped."""
    logp_T, inputs = tokens()
    sequence_T = inputs.extra["sequence"]
    advantage_S = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.3], dtype=torch.float64)
    lengths_S = torch.bincount(sequence_T, minlength=5).double()
    given = sequence_inputs(inputs, advantage=advantage_S[sequence_T])
    leaf_T = logp_T.clone().requires_grad_()
    mean_S = torch.zeros(5, dtype=torch.float64).index_add(0, sequence_T, leaf_T - inputs.old_logp) / lengths_S
    s_S = mean_S.exp()
    bounded_S = s_S.clamp(1 - clips["clip_low"], 1 + clips["clip_high"])
    objective = -torch.minimum(s_S * advantage_S, bounded_S * advantage_S).sum()
    (expected_T,) = torch.autograd.grad(objective, leaf_T)
    terms, slope_T = graded("gspo", logp_T, given, **clips)
    torch.testing.assert_close(slope_T / lengths_S[sequence_T], expected_T, atol=1e-15, rtol=1e-13)
    torch.testing.assert_close((terms.loss / lengths_S[sequence_T]).sum(), objective.detach(), atol=1e-14, rtol=1e-14)
    assert ("open" if clips["clip_low"] == 1 else "clipped") == ("clipped" if (slope_T == 0).any() else "open")


def test_gspo_does_not_care_where_tokens_lie_or_what_they_are_called():
    logp_T, inputs = tokens()
    expected, slope_T = graded("gspo", logp_T, sequence_inputs(inputs))
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    moved = sequence_inputs(inputs).map(lambda x: x[order_T])
    got, moved_slope_T = graded("gspo", logp_T[order_T], moved)
    torch.testing.assert_close(got.loss, expected.loss[order_T], atol=0, rtol=1e-14)
    torch.testing.assert_close(moved_slope_T, slope_T[order_T], atol=0, rtol=1e-14)
    for renamed in (7 - 3 * inputs.extra["sequence"], inputs.extra["sequence"].float(), 10**6 + inputs.extra["sequence"]):
        assert torch.equal(graded("gspo", logp_T, sequence_inputs(inputs, extra={"sequence": renamed}))[0].loss, expected.loss)


def test_gspo_counts_live_tokens_only():
    """A masked token, whatever its inputs hold, is in neither the sum nor the count of its sequence."""
    logp_T, inputs = tokens()
    live = torch.arange(T) % 3 > 0
    coefficient_T = live.double() * 0.5
    stats = TokenStats(*(logp_T.clone().requires_grad_() for _ in range(3)))

    def run(filling):
        dirty = sequence_inputs(inputs, coefficient=coefficient_T, old_logp=torch.where(live, inputs.old_logp, filling))
        out = evaluate_loss(bind("gspo"), stats, dirty, live)
        return out.per_token.loss, torch.autograd.grad(out.loss_sum, stats.logp)[0]

    kept = sequence_inputs(inputs).map(lambda x: x[live])
    expected, slope_T = graded("gspo", logp_T[live], kept)
    for filling in (0.0, math.nan, -math.inf):
        loss_T, got_T = run(filling)
        torch.testing.assert_close(loss_T[live], expected.loss, atol=0, rtol=1e-14)
        torch.testing.assert_close(got_T[live], 0.5 * slope_T, atol=0, rtol=1e-14)
        assert not loss_T[~live].any() and not got_T[~live].any()


def test_gspo_through_the_op_is_two_pass():
    """A one-pass op must not cut a sequence at a chunk: it sees that the loss is not token-local."""
    logits_TV, labels_T, inputs = policy_tokens(T)
    inputs = sequence_inputs(all_own(inputs))
    leaf_TV = logits_TV.detach().requires_grad_()
    out = token_loss(leaf_TV, labels_T, "gspo", inputs=inputs)
    truth = bind("gspo")(dense_stats(logits_TV, labels_T), inputs).loss.sum()
    torch.testing.assert_close(out.loss_sum, truth, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(out.loss_sum, leaf_TV)[0], torch.autograd.grad(truth, logits_TV)[0], atol=1e-12, rtol=0)


def test_a_lone_nan_spoils_its_own_sequence_and_no_other():
    logp_T, inputs = tokens()
    logp_T[3] = math.nan
    loss_T = graded("gspo", logp_T, sequence_inputs(inputs))[0].loss
    assert torch.equal(loss_T.isnan(), inputs.extra["sequence"] == inputs.extra["sequence"][3])


def test_no_token_at_all():
    nothing = torch.zeros(0)
    terms, slope_T = graded("gspo", nothing, TokenInputs(advantage=nothing, extra={"sequence": nothing}))
    assert terms.loss.shape == slope_T.shape == (0,)


def test_what_is_missing_is_named():
    stats = TokenStats(*torch.full((3, 4), -1.0).unbind())
    with pytest.raises(ValueError, match=r"'gspo' needs inputs.extra.sequence .* pass inputs=TokenInputs\(extra=\{'sequence': \.\.\.\}\)"):
        bind("gspo")(stats, TokenInputs(advantage=torch.ones(4)))
    for name in ("gspo", "cispo"):
        with pytest.raises(ValueError, match=f"'{name}' needs inputs.advantage"):
            bind(name)(stats, TokenInputs(extra={"sequence": torch.zeros(4)}))
