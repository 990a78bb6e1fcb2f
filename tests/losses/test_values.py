"""Every loss against a hand-checked table and against its formula written out."""

import math

import pytest
import torch

from megatron_plugin.losses import LOSSES
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenStats
from tests.losses import policy_oracle
from tests.losses.oracle import (
    DETACHED,
    DIFFERENTIATED,
    FORMULAE,
    FP32_LOSS,
    FP64,
    TABLE,
    VOCAB,
    dense_stats,
    dlogits,
    expected_terms,
    random_tokens,
)

LN3 = math.log(3)
HAND = {  # logits, label: p, -logp, H, cll, gamma, dft, chord_phi, idft, srft_demo
    "ln3_label0": ([LN3, 0.0], 0, [0.75, 0.287682, 0.562335, 0.274653, 0.759836, 0.215762, 0.053940, 0.231196, 0.081972]),
    "ln3_label1": ([LN3, 0.0], 1, [0.25, 1.386294, 0.562335, -0.823959, 2.0, 0.346574, 0.259930, 0.086643, 0.395008]),
    "uniform2": ([0.0, 0.0], 0, [0.5, 0.693147, 0.693147, 0.0, 1.0, 0.346574, 0.173287, 0.346574, 0.173287]),
    "uniform4": ([0.0] * 4, 2, [0.25, 1.386294, 1.386294, 0.0, 1.0, 0.346574, 0.259930, 0.346574, 0.173287]),
    "ln4211": ([math.log(v) for v in (4, 2, 1, 1)], 3, [0.125, 2.079442, 1.213008, -0.866434, 2.0, 0.259930, 0.227439, 0.032491, 0.309111]),
}


def hand(case):
    logits, label, numbers = HAND[case]
    logits_TV = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    return logits_TV, torch.tensor([label]), dict(zip("p nll H cll gamma dft chord_phi idft srft_demo".split(), numbers, strict=True))


@pytest.mark.parametrize("case", HAND)
def test_hand_table(case):
    logits_TV, labels_T, expected = hand(case)
    stats = dense_stats(logits_TV, labels_T)
    terms = {name: bind(name)(stats, TokenInputs()) for name in ("sft", "dft", "sft_is", "chord_phi", "idft", "srft_demo")}
    got = {
        "p": terms["dft"].weight,
        "nll": terms["sft"].loss,
        "H": stats.entropy,
        "cll": stats.logp + stats.entropy,
        "gamma": terms["idft"].metrics["gamma"],
        **{name: terms[name].loss for name in ("dft", "chord_phi", "idft", "srft_demo")},
    }
    assert {k: v.item() for k, v in got.items()} == pytest.approx(expected, abs=TABLE, rel=0)
    assert terms["sft_is"].loss.item() == terms["dft"].loss.item()


# SRFT's released sign: the table's 0.1 e^H (-logp) column is w_RL; the same numbers times 5 are 0.5 e^H (-logp)
@pytest.mark.parametrize("case, rl", [("ln3_label0", 0.050481), ("ln3_label1", 0.243262), ("uniform2", 0.138629), ("uniform4", 0.554518)])
def test_hand_table_srft_released_sign(case, rl):
    logits_TV, labels_T, _ = hand(case)
    got = bind("srft_demo", entropy_sign=1)(dense_stats(logits_TV, labels_T), TokenInputs()).loss.item()
    assert got == pytest.approx(5 * rl, abs=5 * TABLE)


@pytest.mark.parametrize("name, down", [("sft", 0.25), ("dft", 0.1875), ("chord_phi", 0.046875), ("idft", 0.200913)])
def test_hand_gradient(name, down):
    logits_TV, labels_T, _ = hand("ln3_label0")
    bind(name)(dense_stats(logits_TV, labels_T), TokenInputs()).loss.sum().backward()
    assert logits_TV.grad[0].tolist() == pytest.approx([-down, down], abs=TABLE)


def test_hand_weights_of_the_remaining_losses():
    """p = 1/4, H = ln 4 = log V: values one can see."""
    logits_TV, labels_T, _ = hand("uniform4")
    stats = dense_stats(logits_TV, labels_T)
    assert bind("gce", gamma=0.5)(stats, TokenInputs()).weight.item() == pytest.approx(0.5)
    assert bind("eaft", vocab_size=4)(stats, TokenInputs()).weight.item() == pytest.approx(1.0)
    assert bind("eaft", vocab_size=16, alpha=2.0)(stats, TokenInputs()).weight.item() == pytest.approx(0.25)
    assert bind("luffy", gamma=0.25)(stats, TokenInputs()).loss.item() == pytest.approx(-0.5)
    assert bind("srft_demo", entropy_sign=1, max_weight=1.5)(stats, TokenInputs()).weight.item() == pytest.approx(1.5)  # 0.5 e^H = 2


def test_hand_weights_of_cll():
    """z = (ln 3, 0): cll is +0.274653 for the likely label and -0.823959 for the other; a token on the threshold is trained."""
    for case, at_minus_half, sigmoid in (("ln3_label0", 1.0, 0.1 + 0.9 * 0.431765), ("ln3_label1", 0.0, 0.1 + 0.9 * 0.695076), ("uniform2", 1.0, 0.55)):
        logits_TV, labels_T, _ = hand(case)
        stats = dense_stats(logits_TV, labels_T)
        assert bind("cll_mask", threshold=-0.5)(stats, TokenInputs()).weight.item() == at_minus_half
        assert bind("cll_sigmoid")(stats, TokenInputs()).weight.item() == pytest.approx(sigmoid, abs=TABLE)
    on_it = TokenStats(torch.tensor([-6.0]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert bind("cll_mask")(on_it, TokenInputs()).weight.item() == 1.0


VARIANTS = [
    *((name, {}) for name in FORMULAE),
    ("gce", {"gamma": 0.0}),
    ("gce", {"gamma": 2.5}),
    ("idft", {"beta": 0.5, "gamma_min": 0.3, "gamma_max": 1.0, "ramp": 0.4}),
    ("idft", {"gamma_max": 4.0}),
    ("cll_mask", {"threshold": -1.0}),
    ("cll_mask", {"threshold": 0.25}),
    ("cll_sigmoid", {"tau": -1.0, "temperature": 0.5, "w_min": 0.2, "w_max": 0.9}),
    ("cll_sigmoid", {"w_min": 1.0, "w_max": 0.0}),
    ("eaft", {"alpha": 0.5}),
    ("srft_demo", {"entropy_sign": 1}),
    ("srft_demo", {"entropy_sign": 1, "max_weight": 1.0}),
    ("luffy", {"gamma": 0.5}),
    ("grpo", {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.5}),
    ("grpo", {"dual_clip": math.inf}),
]
IDS = [" ".join([name, *(f"{k}={v}" for k, v in params.items())]) for name, params in VARIANTS]


def test_every_loss_is_listed():
    assert set(FORMULAE) == {*DETACHED, *DIFFERENTIATED}
    assert set(LOSSES) == {*FORMULAE, *policy_oracle.FORMULAE}, "a new loss needs a formula and a place in one of the lists"


@pytest.mark.parametrize("name, params", VARIANTS, ids=IDS)
def test_value_and_gradient_are_the_formula(name, params):
    logits_TV, labels_T, inputs = random_tokens()
    stats = dense_stats(logits_TV, labels_T)
    terms = bind(name, **params).for_vocabulary(VOCAB)(stats, inputs)
    F_T, a_T, b_T = expected_terms(name, stats, inputs, **params)
    torch.testing.assert_close(terms.loss, F_T, atol=FP64, rtol=FP64)
    (grad_TV,) = torch.autograd.grad(terms.loss.sum(), logits_TV)
    torch.testing.assert_close(grad_TV, dlogits(logits_TV, labels_T, a_T, b_T), atol=FP64, rtol=FP64)
    assert terms.loss.dtype == torch.float64
    if name in DETACHED:
        torch.testing.assert_close(terms.weight, -a_T, atol=FP64, rtol=FP64)
    for column in (terms.weight, *terms.metrics.values()):
        assert column is None or not column.requires_grad, "reported numbers must not hold the graph"


@pytest.mark.parametrize("name, params", VARIANTS, ids=IDS)
def test_tensor_parameters_give_the_same(name, params):
    """0-d tensors stand in for numbers, so that mu and ramps change without recompiling; fp32 ones must not turn fp64 terms into fp32."""
    logits_TV, labels_T, inputs = random_tokens(T=16)
    stats = dense_stats(logits_TV, labels_T)
    if name == "eaft":
        params = {"vocab_size": VOCAB, **params}
    plain = bind(name, **params)(stats, inputs)
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in params.items()}
    torch.testing.assert_close(bind(name, **tensors)(stats, inputs).loss, plain.loss, atol=FP64, rtol=FP64)
    assert bind(name, **{k: v.float() for k, v in tensors.items()})(stats, inputs).loss.dtype == torch.float64


def test_an_integer_tensor_keeps_fp64():
    """log of an integer tensor is fp32 in torch: 1e-8 off before anything is computed."""
    logits_TV, labels_T, inputs = random_tokens(T=16)
    stats = dense_stats(logits_TV, labels_T)
    weight_T = bind("eaft", vocab_size=torch.tensor(VOCAB))(stats, inputs).weight
    torch.testing.assert_close(weight_T, bind("eaft", vocab_size=VOCAB)(stats, inputs).weight, atol=FP64, rtol=FP64)


# the fp64 formula on the same fp32 statistics
@pytest.mark.parametrize("name", FORMULAE)
def test_fp32_is_fp32_accurate(name):
    logits_TV, labels_T, inputs = random_tokens(T=256)
    single = TokenStats(*(x.detach().float() for x in dense_stats(logits_TV, labels_T)))
    inputs = inputs.map(lambda x: x.float())
    terms = bind(name).for_vocabulary(VOCAB)(single, inputs)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss.double(), expected_terms(name, single, inputs)[0], atol=FP32_LOSS, rtol=FP32_LOSS)


def one_token(logp: float) -> TokenStats:
    return TokenStats(torch.tensor([logp]), torch.tensor([0.0]), torch.tensor([0.0]))


def test_chord_weight_does_not_cancel():
    """At logp = -1e-9, 1 - exp(logp) is 0 in fp32: the weight would vanish and so would every gradient behind it."""
    assert bind("chord_phi")(one_token(-1e-9), TokenInputs()).weight.item() == pytest.approx(1e-9, rel=1e-6, abs=0)


def test_small_powers_of_tiny_probabilities_survive():
    """p = e^-200 is 0 in fp32, p^0.1 is 2e-9: the power must be taken in the exponent."""
    for loss in (bind("gce", gamma=0.1), bind("idft", gamma_min=0.1, gamma_max=0.1)):
        assert loss(one_token(-200.0), TokenInputs()).weight.item() == pytest.approx(math.exp(-20), rel=1e-5)


def test_luffy_survives_the_smallest_probabilities():
    """p / (p + gamma) as 1 / (1 + gamma / p) overflows at p = e^-200, and its gradient is then NaN."""
    logp_T = torch.tensor([-200.0, -60.0, 0.0], requires_grad=True)
    bind("luffy")(TokenStats(logp_T, logp_T.detach() * 0, logp_T.detach() * 0), TokenInputs()).loss.sum().backward()
    assert logp_T.grad.tolist() == pytest.approx([0.0, -math.exp(-60) / 0.1, -0.1 / 1.21], rel=1e-5, abs=0)
