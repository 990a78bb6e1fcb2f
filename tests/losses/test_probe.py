"""Token-local or not: what decides whether gradients may be formed inside the forward, so a wrong yes is a wrong gradient."""

import time
import warnings

import pytest
import torch

from megatron_plugin import TokenInputs, TokenTerms, token_loss
from megatron_plugin.losses import LOSSES
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.probe import is_token_local
from tests.losses import user_losses


@pytest.mark.parametrize("name", LOSSES)
def test_every_built_in_is_what_it_says(name):
    """Built-ins are not probed at bind; here they are."""
    assert is_token_local(bind(name)) == bind(name).token_local == (name != "gspo"), "GSPO needs the whole sequence"


@pytest.mark.parametrize("name", ["grpo", "cispo", "chord", "srft"])
def test_options_stay_token_local(name):
    assert is_token_local(bind(name, kl=0.1, tis=2.0, icepop_low=0.5, icepop_high=3.0))
    assert is_token_local(bind("srft", preset="code", entropy_scope="batch"))


@pytest.mark.parametrize("fn", user_losses.LOCAL, ids=lambda fn: fn.__name__)
def test_local_losses_are_found(fn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bind(fn).token_local
        assert bind(fn, entropy_bonus=0.01, z_loss=torch.tensor(0.01)).token_local


@pytest.mark.parametrize("fn", user_losses.NOT_LOCAL, ids=lambda fn: fn.__name__)
def test_losses_that_look_at_other_tokens_are_found(fn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bind(fn).token_local


@pytest.mark.parametrize("fn", [user_losses.raises, user_losses.pairs, user_losses.broken_backward], ids=lambda fn: fn.__name__)
def test_what_cannot_be_probed_is_not_token_local_and_says_so(fn):
    with pytest.warns(UserWarning, match=rf"'{fn.__name__}' raised .* taken as not token-local"):
        assert not bind(fn).token_local


@pytest.mark.parametrize("fn", [user_losses.default_branch, user_losses.noisy], ids=lambda fn: fn.__name__)
def test_the_global_generator_is_not_moved(fn):
    before = torch.get_rng_state()
    bind(fn)
    assert torch.equal(torch.get_rng_state(), before)


def test_surroundings_do_not_matter():
    """bind is called from anywhere: an evaluation loop, a worker with another default dtype."""
    with torch.no_grad():
        assert bind(user_losses.default_branch).token_local
    with torch.inference_mode():
        assert bind(user_losses.default_branch).token_local and not bind(user_losses.gradient_only).token_local
        bind("idft", beta=0.5)
    torch.set_default_dtype(torch.float64)
    try:
        assert bind(user_losses.default_branch).token_local and not bind(user_losses.cumulated).token_local
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_probe_takes_milliseconds():
    """Measured 3 ms; the bound leaves room for a loaded machine and still catches a probe on large tensors."""
    bind(user_losses.kl_to_reference)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        bind(user_losses.kl_to_reference)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_a_loss_with_trainable_tensors_of_its_own_waits_for_the_backward():
    """Formed inside a forward, their gradient would be lost."""
    learned = torch.nn.Parameter(torch.tensor(0.5))

    def loss(stats, inputs):
        return TokenTerms(loss=-learned.exp() * stats.logp)

    assert not bind(loss).token_local
    logits, labels = torch.randn(5, 20), torch.randint(0, 20, (5,))
    out = token_loss(logits, labels, bind(loss))
    out.loss_sum.backward()
    torch.testing.assert_close(learned.grad, out.loss_sum.detach())
    learned.requires_grad_(False)
    assert bind(loss).token_local


@pytest.mark.parametrize("vocabulary", [False, True])
def test_the_metrics_of_a_bound_loss_are_tried_once(vocabulary, monkeypatch):
    """Per kind of inputs, not per call: at every call a step would pay for the function twice."""
    calls = []

    def plain(stats, inputs, *, mu):
        calls.append(len(stats.logp))
        return TokenTerms(loss=-mu * stats.logp, metrics={"mine": stats.logp.detach()})

    def with_vocabulary(stats, inputs, *, mu, vocab_size):
        return plain(stats, inputs, mu=mu)

    loss = bind(with_vocabulary if vocabulary else plain, mu=torch.tensor(0.5))
    logits, labels = torch.randn(5, 20), torch.randint(0, 20, (5,))
    calls.clear()
    for _ in range(3):
        assert "mine" in token_loss(logits, labels, loss).metric_sums
    assert calls == [3, 5, 5, 5]
    token_loss(logits, labels, loss, inputs=TokenInputs(advantage=torch.ones(5)))
    assert calls[4:] == [3, 5], "other inputs may mean another branch"


def test_metrics_that_change_are_named():
    report = {"first": 1}

    def loss(stats, inputs):
        return TokenTerms(loss=-stats.logp, metrics={name: stats.logp.detach() for name in report})

    bound, logits, labels = bind(loss), torch.randn(5, 20), torch.randint(0, 20, (5,))
    token_loss(logits, labels, bound)
    report["second"] = 2
    with pytest.raises(ValueError, match=r"'loss' reported metrics \('first', 'second'\), expected \('first',\)"):
        token_loss(logits, labels, bound)
    assert "second" in token_loss(logits, labels, bind(loss)).metric_sums
