"""SRFT's four terms: hand numbers of each, paper against released code, bounds, and where the entropy comes from."""

import math

import pytest
import torch

from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenStats
from tests.losses.oracle import TABLE, dense_stats
from tests.losses.policy_oracle import policy_tokens

LN3 = math.log(3)
# logits, label: p, w_SFT (-log p) with e^-H, w_RL (-log p) with e^+H
HAND = {
    "ln3_label0": ([LN3, 0.0], 0, 0.75, 0.081972, 0.050481),
    "ln3_label1": ([LN3, 0.0], 1, 0.25, 0.395008, 0.243262),
    "uniform2": ([0.0, 0.0], 0, 0.5, 0.173287, 0.138629),
    "uniform4": ([0.0] * 4, 2, 0.25, 0.173287, 0.554518),
    "ln4211": ([math.log(v) for v in (4, 2, 1, 1)], 3, 0.125, 0.309111, 0.699438),
}
GAMMA = 0.1


def one(logits, label, *, expert, reward=1.0, advantage=0.0, **params):
    """loss, weight and dF/dlogp of one token; on-policy."""
    stats = dense_stats(torch.tensor([logits], dtype=torch.float64, requires_grad=True), torch.tensor([label]))
    inputs = TokenInputs(expert=torch.tensor([expert]), advantage=torch.tensor([advantage]), extra={"reward": torch.tensor([reward])})
    terms = bind("srft", **params)(stats, inputs)
    return terms.loss.item(), terms.weight.item(), torch.autograd.grad(terms.loss.sum(), stats.logp)[0].item()


@pytest.mark.parametrize("case", HAND)
def test_hand_numbers_of_the_paper(case):
    logits, label, p, demo, right = HAND[case]
    nll = -math.log(p)
    assert one(logits, label, expert=True)[0] == pytest.approx(demo, abs=TABLE)
    loss, _, slope = one(logits, label, expert=True, advantage=1.5)
    assert loss == pytest.approx(demo - 1.5 * p, abs=TABLE) and slope == pytest.approx(-demo / nll - 1.5 * p, abs=TABLE / nll)
    loss, weight, slope = one(logits, label, expert=False, reward=1.0, advantage=-7.0)  # the paper's +-1, not the advantage
    assert loss == pytest.approx(right, abs=TABLE) and weight == -slope == pytest.approx(right / nll, abs=TABLE / nll)
    assert one(logits, label, expert=False, reward=0.0, advantage=7.0) == (pytest.approx(-nll, abs=TABLE), -1.0, 1.0)


@pytest.mark.parametrize("case", HAND)
def test_hand_numbers_of_the_code(case):
    """e^+H for demonstrations too, LUFFY's shaping, and the group's advantage on own answers."""
    logits, label, p, _, right = HAND[case]
    nll, shaped = -math.log(p), p / (p + GAMMA)
    loss, weight, slope = one(logits, label, expert=True, advantage=1.5, preset="code")
    assert loss == pytest.approx(5 * right - 1.5 * shaped, abs=5 * TABLE) and weight == pytest.approx(5 * right / nll, abs=5 * TABLE / nll)
    assert slope == pytest.approx(-weight - 1.5 * GAMMA * p / (p + GAMMA) ** 2, abs=1e-12)
    w = right / nll
    assert one(logits, label, expert=False, advantage=2.0, preset="code") == pytest.approx((-2 * w, w, -2 * w), abs=2 * TABLE / nll)
    assert one(logits, label, expert=False, advantage=-2.0, preset="code") == (2.0, 1.0, 2.0)


def test_without_advantage_and_entropy_a_demonstration_is_half_of_sft():
    """Advantage 0 leaves the supervised term alone; H = 0 makes its weight 0.5 in both presets."""
    logits_TV, labels_T, inputs = policy_tokens()
    stats = dense_stats(logits_TV, labels_T)
    sure = stats._replace(entropy=torch.zeros_like(stats.entropy))
    demos = TokenInputs(expert=torch.ones(96, dtype=torch.bool), advantage=torch.zeros(96), extra={"reward": torch.ones(96)})
    for preset in ("paper", "code"):
        terms = bind("srft", preset=preset)(sure, demos)
        torch.testing.assert_close(terms.loss, 0.5 * bind("sft")(stats, demos).loss, atol=0, rtol=1e-15)
    own = TokenInputs(expert=torch.zeros(96, dtype=torch.bool), advantage=torch.zeros(96), extra={"reward": torch.ones(96)})
    torch.testing.assert_close(bind("srft")(sure, own).loss, 0.1 * bind("sft")(stats, own).loss, atol=0, rtol=1e-15)


def test_wrong_answers_are_minus_sft_down_to_the_floor():
    logp_T = torch.tensor([-0.1, -9.9, -10.0, -10.1, -500.0, -math.inf], dtype=torch.float64, requires_grad=True)
    stats = TokenStats(logp_T, logp_T.detach() * 0 + 1, logp_T.detach())
    inputs = TokenInputs(expert=torch.zeros(6, dtype=torch.bool), advantage=torch.full((6,), -1.0), extra={"reward": torch.zeros(6)})
    for floor, passes in ((-10.0, [1, 1, 1, 0, 0, 0]), (-math.inf, [1, 1, 1, 1, 1, 1])):
        terms = bind("srft", wrong_floor=floor)(stats, inputs)
        (slope_T,) = torch.autograd.grad(terms.loss[:5].sum(), logp_T)
        assert slope_T[:5].tolist() == passes[:5] and terms.weight.tolist() == [-x for x in passes]
        assert terms.loss[:5].tolist() == [max(x, floor) for x in logp_T[:5].tolist()]
        assert terms.metrics["rollout/floored"].tolist() == [1 - x for x in passes] and not terms.metrics["rollout/right"].any()
    assert bind("srft")(stats, inputs).loss.min() == -10, "what a sample made impossible is not pushed on"


def test_the_weights_are_held_where_the_entropy_is_large():
    """An untrained model of 151 936 tokens: w_RL would be 15 194."""
    flat = [0.0] * 151936
    assert one(flat, 0, expert=False)[1] == pytest.approx(15193.6, rel=1e-9)
    assert one(flat, 0, expert=False, max_entropy=5.0)[1] == pytest.approx(0.1 * math.exp(5))
    assert one(flat, 0, expert=True, preset="code", max_entropy=5.0)[1] == pytest.approx(0.5 * math.exp(5))
    assert one([LN3, 0.0], 0, expert=False, max_entropy=5.0) == one([LN3, 0.0], 0, expert=False)


def test_weights_are_not_differentiated():
    """d/dH is 0 for every kind of token; a weight through which the gradient went would have the other sign where p is small."""
    logits_TV, labels_T, inputs = policy_tokens()
    stats = TokenStats(*(x.detach().requires_grad_() for x in dense_stats(logits_TV, labels_T)))
    for preset in ("paper", "code"):
        terms = bind("srft", preset=preset)(stats, inputs)
        assert torch.autograd.grad(terms.loss.sum(), stats.entropy, allow_unused=True)[0] is None


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("preset", ["paper", "code"])
def test_entropy_of_a_wider_scope_comes_from_outside(preset, scope):
    """extra['entropy'] takes the place of H: with the token's own in it, it is the token scope; the row's own is not looked at."""
    logits_TV, labels_T, inputs = policy_tokens()
    stats = dense_stats(logits_TV.detach(), labels_T)
    inputs = TokenInputs(**{k: x for k, x in inputs.tensors().items() if not k.startswith("extra.")},
                         extra={"reward": inputs.extra["reward"], "entropy": stats.entropy})  # fmt: skip
    own = bind("srft", preset=preset)(stats, inputs)
    wide = bind("srft", preset=preset, entropy_scope=scope)(stats._replace(entropy=torch.full((96,), torch.nan, dtype=torch.float64)), inputs)
    assert torch.equal(own.loss, wide.loss) and torch.equal(own.weight, wide.weight)


def test_each_source_reads_its_own_inputs_only():
    """policy_tokens holds NaN where a demonstration was never sampled, reward included; NaN on rewards of experts is not read."""
    logits_TV, labels_T, inputs = policy_tokens()
    stats = TokenStats(*(x.detach().requires_grad_() for x in dense_stats(logits_TV, labels_T)))
    for preset, metrics in (("paper", ["rollout/right", "rollout/floored"]), ("code", ["rollout/ratio", "rollout/clip_frac"])):
        terms = bind("srft", preset=preset)(stats, inputs)
        (slope_T,) = torch.autograd.grad(terms.loss.sum(), stats.logp)
        assert terms.loss.isfinite().all() and slope_T.isfinite().all() and (slope_T[inputs.expert] < 1).all()
        assert list(terms.metrics) == metrics and not any(x[inputs.expert].any() for x in terms.metrics.values())


def test_a_stray_label_stays_nan_in_every_branch():
    logp_T = torch.full((3,), math.nan)
    inputs = TokenInputs(expert=torch.tensor([True, False, False]), advantage=torch.tensor([1.0, 1.0, -1.0]), extra={"reward": torch.tensor([1.0, 1.0, 0.0])})
    for preset in ("paper", "code"):
        assert bind("srft", preset=preset)(TokenStats(logp_T, logp_T * 0 + 1, logp_T), inputs).loss.isnan().all()


def test_what_is_missing_is_named():
    stats = TokenStats(*torch.full((3, 2), -1.0).unbind())
    given = {"expert": torch.tensor([True, False]), "advantage": torch.ones(2)}
    for name in given:
        with pytest.raises(ValueError, match=rf"'srft' needs inputs.{name}"):
            bind("srft")(stats, TokenInputs(**{k: v for k, v in given.items() if k != name}))
    with pytest.raises(ValueError, match=r"'srft' needs inputs.extra.reward .*extra=\{'reward'"):
        bind("srft")(stats, TokenInputs(**given))
    with pytest.raises(ValueError, match=r"'srft' needs inputs.extra.entropy"):
        bind("srft", preset="code", entropy_scope="batch")(stats, TokenInputs(**given))
    assert bind("srft", preset="code")(stats, TokenInputs(**given)).loss.isfinite().all(), "the code needs no reward"
