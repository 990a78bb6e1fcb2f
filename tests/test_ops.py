"""The public ops: what they refuse, what they mask, what they report."""

import math

import numpy as np
import pytest
import torch

from megatron_plugin import LOSSES, TokenInputs, TokenTerms, bind, token_loss, token_stats

ALONE = sorted(set(LOSSES) - {"chord", "gspo", "srft"})  # those three need more inputs: tests/losses/test_policy_masks.py has their masked and NaN rows

T, V = 6, 40


@pytest.fixture
def batch():
    return torch.randn(T, V, requires_grad=True), torch.randint(0, V, (T,))


@pytest.mark.parametrize("shape", [(T,), (2, 3), (3, 1, 2)], ids=str)
def test_any_leading_shape(shape):
    logits, labels = torch.randn(*shape, V), torch.randint(0, V, shape)
    out = token_loss(logits, labels, "dft")
    flat = token_loss(logits.reshape(-1, V), labels.reshape(-1), "dft")
    assert out.per_token.logp.shape == shape and torch.equal(out.loss_sum, flat.loss_sum)
    assert token_stats(logits, labels).entropy.shape == shape


@pytest.mark.parametrize("bad, words", [
    (lambda z, y: (z, y.float()), "labels must be integer ids, got torch.float32"),
    (lambda z, y: (z, y.tolist()), r"labels is of type list, expected Tensor: .*torch.tensor\(labels\)"),
    (lambda z, y: (z, None), "labels is of type NoneType, expected Tensor"),
    (lambda z, y: (None, y), "logits is of type NoneType, expected Tensor"),
    (lambda z, y: (z.detach().numpy(), y), "logits is of type ndarray, expected Tensor"),
    (lambda z, y: (z.long(), y), "logits must be floating point"),
    (lambda z, y: (z, y[:-1]), r"labels \[5\] do not fit logits \[6, 40\]: expected \[6\]"),
    (lambda z, y: (z, y.to("meta")), "labels are on meta, logits on cpu"),
    (lambda z, y: (z, y.where(y != y[0], V)), r"label 40 at row 0 is outside the vocabulary \[0, 40\)"),
])
def test_arguments_that_do_not_fit(batch, bad, words):
    logits, labels = bad(*batch)
    for call in (lambda: token_stats(logits, labels), lambda: token_loss(logits, labels, "sft")):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("options, words", [
    (dict(vocab_size=41), "vocab_size=41 .* does not fit 40 logits columns"),
    (dict(vocab_size=0), "vocab_size=0 .* does not fit"),
    (dict(vocab_start=8, vocab_size=40), "vocab_start=8 does not fit"),
    (dict(vocab_start=0), "vocab_start=0 was given without vocab_size"),
    (dict(temperature=0.0), "temperature=0.0 is not positive"),
    (dict(temperature=math.nan), "temperature=nan is not positive"),
    (dict(temperature=math.inf), "temperature=inf is not finite"),
    (dict(temperature="1.0"), "temperature='1.0' is of type str, expected a number"),
    (dict(temperature=None), "temperature=None is of type NoneType, expected a number"),
    (dict(temperature=torch.tensor(1.0)), r"temperature=tensor\(1.\) is of type Tensor, expected a number"),
    (dict(vocab_size=40.0), "vocab_size=40.0 is of type float, expected a whole number"),
    (dict(vocab_size="40"), "vocab_size='40' is of type str"),
    (dict(vocab_start=0.5, vocab_size=40), "vocab_start=0.5 is of type float"),
    (dict(ignore_index=None), "ignore_index=None is of type NoneType, expected a whole number"),
    (dict(tp_group=3), "tensor-parallel group is of type int, expected a torch.distributed.ProcessGroup"),
    (dict(inputs={"advantage": 1}), "inputs is of type dict, expected TokenInputs"),
    (dict(grad_scale=0.0), "grad_scale=0.0: expected a finite number other than 0"),
    (dict(grad_scale=math.inf), "grad_scale=inf: expected a finite number other than 0"),
    (dict(grad_scale="8"), "grad_scale='8' is of type str, expected a number"),
    (dict(grad_scale=torch.ones(1)), r"grad_scale is torch.float32 \[1\] on cpu: expected a number, or a 0-d floating tensor"),
])
def test_options_that_do_not_fit(batch, options, words):
    with pytest.raises(ValueError, match=words):
        token_loss(*batch, "sft", **options)


@pytest.mark.parametrize("inputs, words", [
    (dict(coefficient=torch.ones(T - 1)), r"inputs.coefficient is \[5\] on cpu; expected one value per label, \[6\] on cpu"),
    (dict(advantage=torch.ones(T, device="meta")), "inputs.advantage is .* on meta"),
    (dict(extra={"mine": torch.ones(3)}), r"inputs.extra.mine is \[3\]"),
    (dict(extra={"mine": 3}), "inputs.extra.mine is of type int, expected Tensor: one value per label"),
    (dict(extra=[torch.ones(T)]), "inputs.extra is of type list, expected Mapping"),
    (dict(coefficient=[1.0] * T), r"inputs.coefficient is of type list, expected Tensor: one value per label, \[6\] on cpu"),
    (dict(advantage=1.0), "inputs.advantage is of type float"),
    (dict(coefficient=torch.ones(T, requires_grad=True)), "inputs.coefficient requires a gradient"),
])
def test_inputs_that_do_not_fit(batch, inputs, words):
    with pytest.raises(ValueError, match=words):
        token_loss(*batch, "sft", inputs=TokenInputs(**inputs))


@pytest.mark.parametrize("params", [dict(gamma=torch.tensor(0.5)), dict(entropy_bonus=torch.tensor(0.1)), dict(z_loss=torch.tensor(0.1))], ids=str)
def test_a_trainable_parameter_is_refused_where_its_gradient_would_be_lost(batch, params):
    name, value = next(iter(params.items()))
    loss = bind("gce", **{name: value.requires_grad_()})
    with pytest.raises(ValueError, match=f"{name} requires a gradient, but parameters are constants of a step.*pass {name}.detach"):
        token_loss(*batch, loss)
    with torch.no_grad():
        token_loss(*batch, loss)
    token_loss(*batch, bind("gce", **{name: value.detach()}))


def test_a_trainable_parameter_in_two_passes(batch):
    """A loss that looks at other tokens waits for the backward anyway, and so can a parameter."""
    power = torch.tensor(2.0, requires_grad=True)

    def loss(stats, inputs, *, power):
        return TokenTerms(loss=-power * stats.logp / stats.entropy.detach().mean())

    out = token_loss(*batch, bind(loss, power=power))
    out.loss_sum.backward()
    torch.testing.assert_close(power.grad, out.loss_sum.detach() / 2)


def test_numpy_numbers_are_numbers(batch):
    options = dict(temperature=np.float32(0.5), vocab_size=np.int64(V), ignore_index=np.int32(-100), grad_scale=np.float64(2.0))
    torch.testing.assert_close(token_loss(*batch, "dft", **options).loss_sum, token_loss(*batch, "dft", temperature=0.5).loss_sum)


def test_unknown_loss_and_parameter_come_with_a_suggestion(batch):
    with pytest.raises(ValueError, match="chord_phi"):
        token_loss(*batch, "chord_ph")
    with pytest.raises(ValueError, match="gamma_max"):
        bind("idft", gama_max=1.0)


@pytest.mark.parametrize("loss", ALONE)
def test_a_masked_token_is_nothing(loss):
    """By label or by coefficient 0: the same loss and gradient as without the token, though its logits and inputs are NaN."""
    logits, labels = torch.randn(T, V), torch.randint(0, V, (T,))
    inputs = dict(advantage=torch.randn(T), old_logp=-torch.rand(T) * 5, coefficient=torch.rand(T) + 0.5)
    keep = torch.tensor([0, 1, 3, 5])
    alone = logits[keep].clone().requires_grad_()
    expected = token_loss(alone, labels[keep], loss, inputs=TokenInputs(**{k: v[keep] for k, v in inputs.items()}))
    expected.loss_sum.backward()

    poisoned = logits.clone()
    poisoned[[2, 4]] = math.nan
    inputs["advantage"][2] = inputs["old_logp"][4] = math.nan
    inputs["coefficient"][2] = 0.0
    labels = labels.clone()
    labels[4] = -100
    poisoned.requires_grad_()
    out = token_loss(poisoned, labels, loss, inputs=TokenInputs(**inputs))
    out.loss_sum.backward()
    assert out.num_tokens == expected.num_tokens == 4 and out.num_tokens.dtype == torch.int32
    torch.testing.assert_close(out.loss_sum, expected.loss_sum, atol=0, rtol=1e-6)
    torch.testing.assert_close(poisoned.grad[keep], alone.grad, atol=1e-7, rtol=1e-6)
    assert not poisoned.grad[[2, 4]].any()
    for name, value in out.metric_sums.items():
        torch.testing.assert_close(value, expected.metric_sums[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("loss", ALONE)
def test_nan_logits_in_a_live_row_reach_the_loss(loss, batch):
    logits, labels = batch
    logits = logits.detach().clone()
    logits[3, 7] = math.nan
    out = token_loss(logits, labels, loss, inputs=TokenInputs(advantage=torch.ones(T), old_logp=torch.full((T,), -1.0)))
    assert out.loss_sum.isnan() and out.per_token.logp[3].isnan() and out.per_token.logp.isnan().sum() == 1


def test_nothing_live_is_zero_with_a_gradient(batch):
    logits, labels = batch
    out = token_loss(logits, torch.full_like(labels, -100), "dft")
    out.loss_sum.backward()
    assert out.loss_sum == 0 and out.num_tokens == 0 and not logits.grad.any()


def test_no_tokens_at_all():
    out = token_loss(torch.randn(0, V, requires_grad=True), torch.zeros(0, dtype=torch.int64), "sft")
    out.loss_sum.backward()
    assert out.loss_sum == 0 and out.num_tokens == 0


def test_sft_is_cross_entropy(batch):
    logits, labels = batch
    out = token_loss(logits, labels, "sft")
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(out.loss_sum, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (out.loss_sum, expected)))


def sharpened(stats, inputs, *, power=2.0):
    """A user's own loss."""
    weight = (power * stats.logp.detach()).exp()
    return TokenTerms(loss=-weight * stats.logp, weight=weight)


def test_a_users_own_loss_by_function_and_by_dotted_path(batch):
    by_function = token_loss(*batch, bind(sharpened, power=1.0))
    assert torch.equal(by_function.loss_sum, token_loss(*batch, "dft").loss_sum)
    by_path = token_loss(*batch, bind("tests.test_ops.sharpened", power=1.0))
    assert torch.equal(by_path.loss_sum, by_function.loss_sum)


def test_eaft_uses_the_true_vocabulary(batch):
    logits, labels = batch
    labels = labels.clamp(max=29)
    out = token_loss(logits, labels, "eaft", vocab_size=30)
    expected = token_stats(logits, labels, vocab_size=30).entropy / math.log(30)
    torch.testing.assert_close(out.per_token.weight, expected.detach())


def test_importing_the_package_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, megatron_plugin; assert 'torch' not in sys.modules; megatron_plugin.mu_schedule; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_loss_over_the_batch_does_not_see_padding():
    """A loss that is not token-local finds out from the coefficient which rows are masked."""
    logits, labels = torch.randn(T, V), torch.randint(0, V, (T,))
    alone = token_loss(logits, labels, "tests.losses.user_losses.over_batch_mean")
    padded = token_loss(torch.cat((logits, torch.randn(9, V))), torch.cat((labels, torch.full((9,), -100))), "tests.losses.user_losses.over_batch_mean")
    torch.testing.assert_close(padded.loss_sum, alone.loss_sum)


@pytest.mark.parametrize("loss", [*ALONE, "tests.test_ops.sharpened"])
def test_inference_mode(loss, batch):
    """Evaluation loops use it; nothing in it can be differentiated, not even on the way."""
    inputs = TokenInputs(advantage=torch.ones(T), old_logp=torch.full((T,), -1.0))
    with torch.inference_mode():
        out = token_loss(*batch, loss, inputs=inputs)
    torch.testing.assert_close(out.loss_sum.clone(), token_loss(*batch, loss, inputs=inputs).loss_sum.detach())


def clamped(stats, inputs, *, mu):
    """A user's loss whose parameter must be a tensor, and is told so by name."""
    return TokenTerms(loss=-mu.clamp(0, 1) * stats.logp, metrics={"mu": mu.expand_as(stats.logp)})


def test_a_parameter_may_be_a_tensor_from_the_first_call_on(batch):
    logits, labels = batch
    assert torch.equal(token_loss(*batch, bind("eaft", vocab_size=torch.tensor(40.0))).loss_sum, token_loss(*batch, bind("eaft", vocab_size=40)).loss_sum)
    out = token_loss(*batch, bind(clamped, mu=torch.tensor(0.5)))
    torch.testing.assert_close(out.loss_sum, 0.5 * token_loss(*batch, "sft").loss_sum)
    assert out.metric_sums["mu"] == 0.5 * T


@pytest.mark.parametrize("name", ["logp", "reach", "nll", "z_loss"])
def test_a_metric_must_not_take_the_name_of_ours(name, batch):
    def loss(stats, inputs):
        return TokenTerms(loss=-stats.logp, metrics={name: stats.logp.detach()})

    with pytest.raises(ValueError, match=f"metric called '{name}'"):
        token_loss(*batch, loss)
