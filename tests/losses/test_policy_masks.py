"""Losses with rollouts under the mask: what a masked row holds never matters, nothing waits for the device, no row is needed."""

import math

import pytest
import torch

from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs
from megatron_plugin.losses.reduction import evaluate_loss
from tests.losses.policy_oracle import FORMULAE

OPTIONS = {"kl": 0.1, "tis": 2.0, "icepop_low": 0.1, "entropy_bonus": 0.1, "z_loss": 0.1}
CASES = [*((name, OPTIONS) for name in FORMULAE), ("srft", OPTIONS | {"preset": "code", "entropy_scope": "batch"}), ("chord", OPTIONS | {"preset": "is"})]
IDS = [f"{name} {params.get('preset', '')}" for name, params in CASES]
LIVE = torch.tensor([True, False, True, True, False])
SEQUENCE = torch.tensor([0, 0, 0, 1, 1])


def inputs_of(columns: dict[str, torch.Tensor], expert: torch.Tensor) -> TokenInputs:
    extra = {"sequence": SEQUENCE.to(expert.device), "reward": columns["reward"], "entropy": columns["entropy"]}
    fields = {name: columns[name] for name in ("coefficient", "advantage", "old_logp", "rollout_logp", "ref_logp")}
    return TokenInputs(**fields, expert=expert, extra=extra)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("expert", [[False, False, True, False, True], [False] * 5], ids=["mixed", "own"])
@pytest.mark.parametrize("name, params", CASES, ids=IDS)
def test_nothing_in_a_masked_row_matters(name, params, expert, poison):
    """Rows 1 and 4 poisoned, statistics too: sums, counts and the other rows' gradients are bitwise those of clean rows, which they share a sequence with."""

    def result(row):
        columns = {key: torch.where(LIVE, torch.linspace(-1.2, -0.4, 5) * (1 + 0.1 * i), row)
                   for i, key in enumerate(("coefficient", "advantage", "old_logp", "rollout_logp", "ref_logp", "reward", "entropy"))}  # fmt: skip
        stats = TokenStats(*(torch.where(LIVE, torch.tensor(x), row).requires_grad_() for x in ([-1.0, 0, -2.0, -0.5, 0], [0.5, 0, 1.0, 2.0, 0], [3.0, 0, 1, 2, 0])))
        out = evaluate_loss(bind(name, **params), stats, inputs_of(columns, torch.tensor(expert)), LIVE)
        return out, torch.stack(torch.autograd.grad(out.loss_sum, stats))

    (clean, clean_grad), (got, grad) = result(0.0), result(poison)
    assert torch.equal(grad, clean_grad) and not grad[:, ~LIVE].any() and grad.isfinite().all() and grad[0, LIVE].any()
    assert torch.equal(got.loss_sum, clean.loss_sum) and got.num_tokens == 3
    assert all(torch.equal(got.metric_sums[k], clean.metric_sums[k]) for k in clean.metric_sums)
    assert all(torch.equal(x, y) for x, y in zip(got.per_token, clean.per_token, strict=True))


@pytest.mark.parametrize("tokens", [5, 0], ids=["all_masked", "no_token"])
@pytest.mark.parametrize("name, params", CASES, ids=IDS)
def test_no_live_token_is_zero_with_an_edge(name, params, tokens):
    stats = TokenStats(*(torch.zeros(tokens, requires_grad=True) for _ in range(3)))
    columns = {key: torch.full((tokens,), math.nan) for key in ("coefficient", "advantage", "old_logp", "rollout_logp", "ref_logp", "reward", "entropy")}
    inputs = inputs_of(columns, torch.zeros(tokens, dtype=torch.bool)).map(lambda x: x[:tokens])
    out = evaluate_loss(bind(name, **params), stats, inputs, torch.zeros(tokens, dtype=torch.bool))
    assert out.loss_sum == 0 and out.num_tokens == 0 and not any(out.metric_sums.values())
    out.loss_sum.backward()
    assert stats.logp.grad.shape == (tokens,) and not stats.logp.grad.any()


@pytest.mark.parametrize("name, params", CASES, ids=IDS)
def test_nothing_is_read_back_from_the_device(name, params):
    """On the meta device every .item() and bool() raises: what runs there waits for no GPU."""
    column = torch.zeros(5, device="meta")
    columns = dict.fromkeys(("coefficient", "advantage", "old_logp", "rollout_logp", "ref_logp", "reward", "entropy"), column)
    stats = TokenStats(*(column.clone().requires_grad_() for _ in range(3)))
    evaluate_loss(bind(name, **params), stats, inputs_of(columns, column > 0), column > 0).loss_sum.backward()


@pytest.mark.parametrize("name, params", CASES, ids=IDS)
def test_terms_do_not_widen(name, params):
    """fp64 inputs beside fp32 statistics leave the loss in fp32, as data loaders and hosts make them."""
    columns = {key: -torch.ones(5, dtype=torch.float64) for key in ("coefficient", "advantage", "old_logp", "rollout_logp", "ref_logp", "reward", "entropy")}
    stats = TokenStats(*(torch.full((5,), x) for x in (-1.0, 1.0, 2.0)))
    terms = bind(name, **params)(stats, inputs_of(columns, torch.tensor([True, False, False, False, True])))
    assert terms.loss.dtype == torch.float32 and {x.dtype for x in terms.metrics.values()} == {torch.float32}
    assert terms.weight is None or terms.weight.dtype == torch.float32
