"""bind: names, paths and functions; every mistake is a ValueError that says what was got, what is valid and what was probably meant."""

import dataclasses
import functools
import math

import pytest
import torch

from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses import LOSSES
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenLoss
from megatron_plugin.losses.dft import dft, gce
from tests.losses import user_losses

HERE = "tests.losses.user_losses"
STATS = TokenStats(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))


def test_by_name_path_function_and_token_loss():
    for loss in ("gce", "megatron_plugin.losses.dft.gce", gce, TokenLoss(gce), LOSSES["gce"]):
        bound = bind(loss, gamma=1.0)
        assert bound.name == "gce" and bound.params == {"gamma": 1.0} and bound.token_local and bound.bound
        assert torch.equal(bound(STATS, TokenInputs()).loss, dft(STATS, TokenInputs()).loss)
    assert bind(f"{HERE}.tempered", tau=2.0)(STATS, TokenInputs()).weight.tolist() == pytest.approx([math.exp(-0.5), math.exp(-1)])


def test_binding_again_keeps_and_overrides():
    first = bind("idft", beta=0.5, z_loss=0.1)
    assert bind(first) is first, "an op may bind at every call"
    again = bind(first, gamma_max=1.0, z_loss=0.2, entropy_bonus=0.3)
    assert again.params == {"beta": 0.5, "gamma_max": 1.0} and again.regularisers == {"z_loss": 0.2, "entropy_bonus": 0.3}
    assert first.params == {"beta": 0.5} and first.regularisers == {"z_loss": 0.1}


def test_callable_objects_and_partials_have_names():
    assert bind(f"{HERE}.focal").name == "Focal"
    assert bind(functools.partial(gce, gamma=0.5)).name == "partial" and bind(functools.partial(gce, gamma=0.5)).token_local
    assert bind(lambda stats, inputs, **anything: dft(stats, inputs), whatever=3).params == {"whatever": 3}


def test_vocabulary_is_filled_in_later_unless_given():
    assert bind("eaft").for_vocabulary(11).params == {"vocab_size": 11}
    assert bind("eaft", vocab_size=7).for_vocabulary(11).params == {"vocab_size": 7}
    assert bind("dft").for_vocabulary(11).params == {}


MISTAKES = {
    "unknown name": ("grop", {}, r"unknown loss 'grop' \(did you mean 'grpo'\?\); expected one of chord, chord_phi, cispo, cll_mask, .*srft_demo"),
    "capitals": ("DFT", {}, r"did you mean 'dft'"),
    "nothing near": ("zzz", {}, r"unknown loss 'zzz'; expected one of"),
    "not a loss": (3, {}, r"got a loss of type int, expected a name"),
    "unknown parameter": ("idft", {"gama_min": 0.2}, r"no parameter 'gama_min' \(did you mean 'gamma_min'\?\); expected one of beta, "),
    "no parameters": ("dft", {"gamma": 1.0}, r"'dft' has no parameter 'gamma'; expected one of entropy_bonus, z_loss"),
    "regulariser": ("dft", {"z_los": 1.0}, r"did you mean 'z_loss'"),
    "regulariser value": ("dft", {"z_loss": "1e-4"}, r"got z_loss='1e-4', expected a number .* YAML reads 1e-4 as text"),
    "regulariser none": ("dft", {"entropy_bonus": None}, r"entropy_bonus=None, expected a number"),
    "missing package": ("no_such_package.f", {}, r"cannot import 'no_such_package' .*expected 'package.module.function'"),
    "missing function": (f"{HERE}.temperd", {}, r"has no 'temperd' \(did you mean 'tempered'\?\)"),
    "odd path": (".dft", {}, r"cannot import ''"),
    "relative path": ("..dft", {}, r"cannot import '\.'"),
    "missing parameter": (f"{HERE}.tempered", {}, r"'tempered' needs .*parameter 'tau'.* it takes floor, tau, entropy_bonus, z_loss"),
    "out of range": ("idft", {"ramp": 1.5}, r"'idft': got ramp=1.5, expected a number in \[0, 1\]"),
    "crossed bounds": ("idft", {"gamma_min": 3.0}, r"gamma_max=2.0, expected a number in \[3, inf\)"),
    "beta": ("idft", {"beta": 0.0}, r"beta=0.0, expected a number in \(0, inf\)"),
    "infinite": ("gce", {"gamma": math.inf}, r"gamma=inf, expected a number in \[0, inf\)"),
    "nan": ("gce", {"gamma": math.nan}, r"gamma=nan"),
    "bool": ("gce", {"gamma": True}, r"gamma=True, expected a number"),
    "vector": ("gce", {"gamma": torch.ones(2)}, r"gamma is a tensor of shape \[2\]; expected a number or a 0-d tensor"),
    "threshold of cll_mask": ("cll_mask", {"threshold": math.inf}, r"'cll_mask': got threshold=inf, expected a number"),
    "temperature of cll_sigmoid": ("cll_sigmoid", {"temperature": 0.0}, r"'cll_sigmoid': got temperature=0.0, expected a number in \(0, inf\)"),
    "weight of cll_sigmoid": ("cll_sigmoid", {"w_min": -0.1}, r"'cll_sigmoid': got w_min=-0.1, expected a number in \[0, inf\)"),
    "vocabulary": ("eaft", {"vocab_size": 1}, r"vocab_size=1, expected a number in \[2"),
    "sign": ("srft_demo", {"entropy_sign": 0}, r"entropy_sign=0, expected -1 \(the paper\) or \+1"),
    "max_weight": ("srft_demo", {"max_weight": 0}, r"max_weight=0"),
    "luffy": ("luffy", {"gamma": 0}, r"gamma=0, expected a number in \(0, inf\)"),
    "clip_low": ("grpo", {"clip_low": 1.5}, r"clip_low=1.5, expected a number in \[0, 1\]"),
    "dual_clip": ("grpo", {"dual_clip": 1.0}, r"dual_clip=1.0, expected a number in \(1, inf\]"),
    "clip_low of cispo": ("cispo", {"clip_low": 1.5}, r"'cispo': got clip_low=1.5, expected a number in \[0, 1\]"),
    "clip_high of cispo": ("cispo", {"clip_high": -1.0}, r"'cispo': got clip_high=-1.0"),
    "clip_low of gspo": ("gspo", {"clip_low": -0.1}, r"'gspo': got clip_low=-0.1"),
    "clip_high of gspo": ("gspo", {"clip_high": "4e-4"}, r"'gspo': got clip_high='4e-4', .* YAML reads 1e-4 as text"),
    "dual_clip of gspo": ("gspo", {"dual_clip": 3.0}, r"'gspo' has no parameter 'dual_clip'"),
    "preset": ("chord", {"preset": "fi"}, r"'chord': got preset='fi', expected one of mu, phi, is, shipped, trinity, chord_mu, "),
    "preset is no number": ("chord", {"preset": 1.0}, r"'chord': got preset=1.0, expected one of mu, "),
    "clips of chord": ("chord", {"dual_clip": 0.5}, r"'chord': got dual_clip=0.5, expected a number in \(1, inf\]"),
    "preset of srft": ("srft", {"preset": "luffy"}, r"'srft': got preset='luffy', expected one of paper, code"),
    "scope": ("srft", {"entropy_scope": "step"}, r"'srft': got entropy_scope='step', expected one of token, sequence, batch"),
    "floor": ("srft", {"wrong_floor": 3.0}, r"'srft': got wrong_floor=3.0, expected a number in .*, 0\]"),
    "max_entropy": ("srft", {"max_entropy": -1.0}, r"'srft': got max_entropy=-1.0"),
    "gamma of srft": ("srft", {"gamma": 0.0, "preset": "code"}, r"got gamma=0.0, expected a number in \(0, inf\)"),
    "kl": ("grpo", {"kl": -0.1}, r"'grpo': got kl=-0.1, expected a number in \[0, inf\)"),
    "estimator": ("grpo", {"kl_estimator": "k4"}, r"'grpo': got kl_estimator='k4', expected one of k1, k2, k3, k1\+, k3\+"),
    "estimator is no tensor": ("grpo", {"kl_estimator": torch.tensor(3)}, r"got kl_estimator=tensor\(3\), expected one of k1"),
    "tis": ("chord", {"tis": 0.0}, r"'chord': got tis=0.0, expected a number in \(0, inf\]"),
    "band": ("cispo", {"icepop_low": 2.0, "icepop_high": 0.5}, r"'cispo': got icepop_high=0.5, expected a number in \[2, inf\]"),
    "scalar loss": (user_losses.scalar, {}, r"'scalar' returned 'loss' of shape \[\] for tokens of .*one value per token"),
    "scalar hidden by a regulariser": (user_losses.scalar, {"z_loss": 0.1}, r"'scalar' returned 'loss' of shape \[\]"),
    "bare tensor": (user_losses.bare_tensor, {}, r"returned Tensor, expected TokenTerms"),
    "all detached": (user_losses.all_detached, {}, r"would train nothing; detach the weight, not the loss"),
    "scalar metric": (user_losses.scalar_metric, {}, r"returned 'accuracy' of shape \[\]"),
    "taken metric": (user_losses.taken_metric, {}, r"a metric called 'nll'.*rename"),
    "wrong arguments": (user_losses.labels_first, {}, r"takes \(labels\); a loss is fn\(stats, inputs, \*, "),
    "own z_loss": (user_losses.with_own_z_loss, {}, r"has a parameter called z_loss"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    loss, params, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        bind(loss, **params)


def test_an_error_inside_the_users_module_keeps_its_cause(tmp_path, monkeypatch):
    (tmp_path / "half_a_module.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="no_such_dependency") as raised:
        bind("half_a_module.f")
    assert isinstance(raised.value.__cause__, ImportError)


def test_a_loss_the_user_registers_is_probed():
    LOSSES["mine"] = TokenLoss(user_losses.batch_normalised)
    try:
        assert not bind("mine").token_local
    finally:
        del LOSSES["mine"]


def test_token_local_false_is_believed():
    assert not bind(TokenLoss(user_losses.default_branch, token_local=False)).token_local
    assert not bind(dataclasses.replace(LOSSES["dft"], token_local=False), z_loss=0.1).token_local
