"""What megatron-core gets from our loss_func: a local sum, a local count, and pairs to report; and what is refused."""

import pytest
import torch

from megatron_plugin import LOSSES, TokenInputs
from megatron_plugin.hooks.report import token_means
from tests.hooks.ranks import PADDED, SEQUENCE, VOCABULARY
from tests.spawn import on_ranks

RANKS = "tests.hooks.ranks"


def _case():
    """2 x 8 tokens on 48 columns of which 37 are tokens; the padding would win if it counted."""
    logits = torch.randn(2, SEQUENCE, PADDED)
    logits[..., VOCABULARY:] = 9.0
    labels = torch.randint(0, VOCABULARY, (2, SEQUENCE))
    logp = logits[..., :VOCABULARY].double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return logits, labels, logp


def _call(**arguments):
    return on_ranks(2, RANKS, "call", **arguments)


def test_the_three_tuple():
    logits, labels, logp = _case()
    loss_mask = torch.ones(2, SEQUENCE)
    loss_mask[0, :5] = 0.0
    logits[0, 0] = float("nan")  # a masked row
    live, p = loss_mask.bool(), logp.exp()
    for loss_sum, count, report, grad in _call(logits=logits, labels=labels, loss_mask=loss_mask):
        assert count == (torch.int32, torch.Size([]), 11), "megatron-core adds it into an int32 tensor in place"
        assert float(loss_sum) == pytest.approx(float((-p * logp)[live].sum()), rel=1e-5)
        assert all(pair.shape == (2,) and float(pair[1]) == 11 and not pair.requires_grad for pair in report.values())
        assert float(report["lm loss"][0]) == pytest.approx(float(loss_sum))
        assert float(report["nll"][0]) == pytest.approx(float(-logp[live].sum()), rel=1e-5)
        assert float(report["token_prob"][0]) == pytest.approx(float(p[live].sum()), rel=1e-5)
        assert {"nll", "token_prob", "entropy", "weight"} <= set(report)
        assert grad.isfinite().all() and not grad[~live].any() and grad[live].any()


def test_the_loss_mask_weights_and_multiplies_the_coefficient():
    logits, labels, logp = _case()
    loss_mask, coefficient = torch.rand(2, SEQUENCE), torch.rand(2, SEQUENCE)
    loss_mask[1, 3] = coefficient[1, 4] = 0.0
    loss_sum, count, report, _ = _call(
        logits=logits, labels=labels, loss_mask=loss_mask, inputs=TokenInputs(coefficient=coefficient), loss="sft"
    )[0]
    assert float(loss_sum) == pytest.approx(float((-logp * loss_mask * coefficient).sum()), rel=1e-5)
    assert count[2] == 14 and float(report["nll"][1]) == 14, "0 masks, any other value weights"


def test_without_a_mask_ignore_index_masks():
    logits, labels, logp = _case()
    labels[0, 2:] = -100
    loss_sum, count, _, _ = _call(logits=logits, labels=labels, loss="sft")[0]
    live = labels != -100
    assert count[2] == 10 and float(loss_sum) == pytest.approx(float(-logp[live].sum()), rel=1e-5)


def test_parameters_and_temperature_reach_the_loss():
    logits, labels, _ = _case()
    logp = (logits[..., :VOCABULARY].double() / 2.0).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    loss_sum = _call(logits=logits, labels=labels, loss="gce", gamma=0.5, temperature=2.0)[0][0]
    assert float(loss_sum) == pytest.approx(float((-(0.5 * logp).exp() * logp).sum()), rel=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"calculate_per_token_loss": False}, "got config.calculate_per_token_loss=False, expected True.*--calculate-per-token-loss"),
        ({"finalize_model_grads_func": None}, "got config.finalize_model_grads_func=None, expected a function that divides"),
    ],
)
def test_a_config_that_would_normalise_otherwise_is_refused(fields, message):
    logits, labels, _ = _case()
    for answer in _call(logits=logits, labels=labels, fields=fields):
        assert isinstance(answer, str)
        with pytest.raises(ValueError, match=message):
            raise ValueError(answer)


def test_evaluation_needs_no_finalize():
    logits, labels, logp = _case()
    loss_sum = _call(logits=logits, labels=labels, loss="sft", grad=False, fields={"finalize_model_grads_func": None})[0][0]
    assert float(loss_sum) == pytest.approx(float(-logp.sum()), rel=1e-5)


def test_other_refusals():
    logits, labels, _ = _case()
    assert "got config.mtp_num_layers=1, expected None" in _call(logits=logits, labels=labels, fields={"mtp_num_layers": 1})[0]
    assert "unknown loss 'dtf' (did you mean 'dft'?)" in _call(logits=logits, labels=labels, loss="dtf")[0]
    assert "labels" in _call(logits=logits, labels=labels[:, 1:])[0]
    assert "inputs.coefficient" in _call(logits=logits, labels=labels, loss_mask=torch.ones(SEQUENCE))[0]
    assert "got a tp_group of 2 ranks, expected tensor_model_parallel_size=1" in on_ranks(2, RANKS, "wrong_group")[0]


def test_every_loss_trains_a_model():
    first, second = on_ranks(2, RANKS, "every_loss")
    assert set(first) == set(LOSSES)
    for name, (loss, grad_norm) in first.items():
        assert grad_norm > 0 and loss == loss and second[name][0] == loss, name


def test_token_means():
    pair = lambda total, count: torch.tensor([total, count])  # noqa: E731
    reports = [{"lm loss": pair(6.0, 2.0), "nll": pair(1.0, 2.0)}, {"lm loss": pair(2.0, 6.0), "nll": pair(7.0, 6.0)}]
    assert token_means(reports) == {"lm loss": 1.0, "nll": 1.0, "num_tokens": 8.0}, "a mean over tokens, not of micro-batches' means"
    assert token_means([]) == {}, "an earlier pipeline stage"
    empty = token_means([{"lm loss": pair(0.0, 0.0)}])
    assert empty["num_tokens"] == 0 and empty["lm loss"] != empty["lm loss"]
