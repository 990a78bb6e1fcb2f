"""From terms to sums: the coefficient, the mask, the counts, and no way for a masked row to matter."""

import math

import pytest
import torch

from megatron_plugin.kernels.objective import COLUMNS
from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import BASE_METRICS, TokenInputs, TokenTerms
from megatron_plugin.losses.reduction import evaluate_loss, term_table
from tests.losses.oracle import FORMULAE

LIVE = torch.tensor([True, False, True, True])
COEFFICIENT = torch.tensor([0.5, 7.0, 0.25, 0.0])


def leaves(logp=(-1.0, 0.0, -2.0, -0.5), entropy=(0.5, 0.0, 1.0, 2.0), dtype=torch.float32):
    """Row 1 as the op leaves a masked one."""
    return TokenStats(*(torch.tensor(x, dtype=dtype, requires_grad=True) for x in (logp, entropy, (3.0, 0.0, 1.0, 2.0))))


def reduced(loss, inputs=None, live=LIVE, stats=None):
    stats, inputs = stats or leaves(), inputs or TokenInputs()
    return stats, evaluate_loss(loss, stats, inputs, live)


def test_by_hand():
    stats, out = reduced(bind("dft"), TokenInputs(coefficient=COEFFICIENT))
    p = [math.exp(-1), math.exp(-2), math.exp(-0.5)]
    dft = [p[0] * 1, p[1] * 2, p[2] * 0.5]
    assert out.loss_sum.item() == pytest.approx(0.5 * dft[0] + 0.25 * dft[1], rel=1e-6)
    assert out.num_tokens.item() == 3
    expected = {  # the coefficient is in none of them
        "loss": sum(dft), "nll": 3.5, "token_prob": sum(p), "entropy": 3.5, "cll": 0.0,
        "weight": sum(p), "weight_sq": sum(x * x for x in p),
    }  # fmt: skip
    assert {k: v.item() for k, v in out.metric_sums.items()} == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert set(expected) == set(BASE_METRICS)
    out.loss_sum.backward()
    assert stats.logp.grad.tolist() == pytest.approx([-0.5 * p[0], 0.0, -0.25 * p[1], 0.0], rel=1e-6)
    assert out.per_token.logp.tolist() == [-1.0, 0.0, -2.0, -0.5] and out.per_token.entropy.tolist() == [0.5, 0.0, 1.0, 2.0]
    assert out.per_token.weight.tolist() == pytest.approx([p[0], 0.0, p[1], p[2]], rel=1e-6)
    assert out.per_token.loss.tolist() == pytest.approx([dft[0], 0.0, dft[1], dft[2]], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_and_graph(dtype):
    stats = leaves(dtype=dtype)
    inputs = TokenInputs(coefficient=COEFFICIENT.double())  # a wider coefficient must not widen the loss
    out = reduced(bind("idft", z_loss=0.1), inputs, stats=stats)[1]
    assert out.loss_sum.dtype == dtype and out.loss_sum.ndim == 0 and out.loss_sum.requires_grad
    assert out.num_tokens.dtype == torch.int32 and out.num_tokens.ndim == 0
    assert set(out.metric_sums) == {*BASE_METRICS, "gamma", "z_loss"}
    for value in out.metric_sums.values():
        assert value.dtype == torch.float32 and value.ndim == 0 and not value.requires_grad
    for column in out.per_token:
        assert column.shape == LIVE.shape and column.dtype == dtype and not column.requires_grad


def test_a_loss_without_weight_counts_weight_one():
    out = reduced(bind("sft"))[1]
    assert out.metric_sums["weight"] == 3 and out.metric_sums["weight_sq"] == 3 and out.per_token.weight.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FORMULAE)
def test_nothing_in_a_masked_row_matters(name, poison):
    """Every input of row 1 poisoned, its statistics too: sums, counts and the other rows' gradients are bitwise those of a clean row."""

    def result(row):
        ones = torch.ones(4).index_fill(0, torch.tensor([1]), row)
        inputs = TokenInputs(coefficient=ones, advantage=ones, old_logp=-ones)
        stats = leaves(logp=(-1.0, row, -2.0, -0.5), entropy=(0.5, abs(row), 1.0, 2.0))
        out = evaluate_loss(bind(name, entropy_bonus=0.1, z_loss=0.1).for_vocabulary(9), stats, inputs, LIVE)
        return out, torch.stack(torch.autograd.grad(out.loss_sum, stats))

    (clean, clean_grad), (got, grad) = result(0.0), result(poison)
    assert torch.equal(grad, clean_grad) and not grad[:, 1].any() and grad.isfinite().all()
    assert torch.equal(got.loss_sum, clean.loss_sum) and got.num_tokens == 3
    assert all(torch.equal(got.metric_sums[k], clean.metric_sums[k]) for k in clean.metric_sums)
    assert all(torch.equal(x, y) for x, y in zip(got.per_token, clean.per_token, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_the_table_sends_exact_zeros_into_masked_terms(poison):
    term_T = torch.tensor([1.0, poison, 2.0, 3.0], requires_grad=True)
    inputs = TokenInputs(coefficient=torch.tensor([0.5, poison, 1.0, 1.0]))
    terms = TokenTerms(loss=term_T, weight=term_T.detach(), metrics={"own": term_T.detach()})
    table_CT, weighted_T = term_table(leaves(), terms, inputs, LIVE)
    weighted_T.sum().backward()
    assert weighted_T.sum() == 5.5 and term_T.grad.tolist() == [0.5, 0.0, 1.0, 1.0]
    assert len(table_CT) == len(COLUMNS) + 1 and table_CT[-1].sum() == 6 and table_CT[COLUMNS.index("weighted_loss")].sum() == 5.5


def test_nan_in_a_live_row_is_seen():
    out = reduced(bind("chord_phi"), stats=leaves(logp=(-1.0, 0.0, math.nan, -0.5)))[1]
    assert out.loss_sum.isnan() and out.metric_sums["nll"].isnan() and out.per_token.loss.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", FORMULAE)
@pytest.mark.parametrize("tokens", [4, 0], ids=["all_masked", "no_token"])
def test_no_live_token_is_zero_with_an_edge(name, tokens):
    """A rank with an all-masked micro-batch must still run its backward, or the collectives of the others wait for ever."""
    stats = TokenStats(*(torch.zeros(tokens, requires_grad=True) for _ in range(3)))
    inputs = TokenInputs(coefficient=torch.ones(tokens), advantage=torch.ones(tokens))
    _, out = reduced(bind(name).for_vocabulary(9), inputs, torch.zeros(tokens, dtype=torch.bool), stats)
    assert out.loss_sum == 0 and out.num_tokens == 0 and not any(out.metric_sums.values())
    out.loss_sum.backward()
    assert stats.logp.grad.shape == (tokens,) and not stats.logp.grad.any()


def test_splitting_the_batch_changes_nothing():
    """Sums, not means: two micro-batches add up to one."""
    inputs = TokenInputs(coefficient=COEFFICIENT)
    whole = reduced(bind("idft"), inputs)[1]
    stats = leaves()
    parts = []
    for part in (slice(0, 2), slice(2, 4)):
        cut = TokenStats(*(x[part] for x in stats))
        parts.append(reduced(bind("idft"), inputs.map(lambda x, part=part: x[part]), LIVE[part], cut)[1])
    assert sum(p.loss_sum for p in parts).item() == pytest.approx(whole.loss_sum.item(), rel=1e-6)
    assert sum(p.num_tokens for p in parts) == whole.num_tokens
    for key, value in whole.metric_sums.items():
        assert sum(p.metric_sums[key] for p in parts).item() == pytest.approx(value.item(), rel=1e-6, abs=1e-6)


def test_effective_sample_size_from_the_sums():
    """weight^2 / weight_sq: all weight on one of three tokens is a sample of one."""
    stats = leaves(logp=(0.0, 0.0, -200.0, -200.0))
    sums = reduced(bind("dft"), stats=stats)[1].metric_sums
    assert (sums["weight"] ** 2 / sums["weight_sq"]).item() == pytest.approx(1.0)


def test_a_reduced_term_is_refused():
    with pytest.raises(ValueError, match=r"'loss' of shape \[\] for tokens of shape \[4\], expected one value per token"):
        term_table(leaves(), TokenTerms(loss=torch.tensor(1.0)), TokenInputs(), LIVE)


def test_nothing_is_read_back_from_the_device():
    """On the meta device every .item() and bool() raises: what runs there waits for no GPU."""
    column = torch.zeros(4, device="meta")
    stats = TokenStats(*(column.clone().requires_grad_() for _ in range(3)))
    inputs = TokenInputs(coefficient=column, advantage=column, old_logp=column)
    for name in FORMULAE:
        loss = bind(name, entropy_bonus=0.1, z_loss=0.1).for_vocabulary(9)
        evaluate_loss(loss, stats, inputs, column > 0).loss_sum.backward()
