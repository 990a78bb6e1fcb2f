"""Which tokens enter the GEMMs: the plan of the chunks, masked tokens, rows given by the data layer, rows that weigh little."""

import math

import pytest
import torch

from megatron_plugin import Head, Plan, TokenInputs, bind, linear_token_loss, linear_token_stats
from megatron_plugin.kernels.backend import use_backend
from megatron_plugin.kernels.chunks import chunk_size, plan_chunks
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.linear_token_loss import linear_token_loss_table
from megatron_plugin.kernels.linear_token_stats import linear_token_stats as swept_token_stats
from megatron_plugin.kernels.objective import COLUMNS
from megatron_plugin.kernels.sweep import Sweep
from megatron_plugin.losses.objective import objective_of
from tests import tolerances as tol
from tests.kernels.linear_oracle import MASKED, GemmFlop, dense, distance, leaf, problem

CPU = torch.device("cpu")


def _places(chunk, places):
    return list(range(places.start, places.stop)) if isinstance(places, slice) else places.tolist()


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("density", [None, 0.0, 0.1, 0.5, 1.0])
def test_every_kept_token_is_in_one_chunk(slices, chunk_tokens, density):
    """Token r * S + s lies in row s of slice r; gathered rows come slice by slice."""
    S = 20
    T = slices * S
    kept = None if density is None else (torch.rand(T) < density).nonzero().view(-1)
    chunks = plan_chunks(T, slices, chunk_tokens, kept=kept, device=CPU)
    seen = []
    for chunk in chunks:
        rows, tokens = _places(chunk, chunk.rows), _places(chunk, chunk.tokens)
        gathered = [r * S + s for r in range(slices) for s in rows]
        assert tokens == (gathered if chunk.kept is None else [gathered[i] for i in chunk.kept.tolist()])
        assert chunk.size == len(tokens) and chunk.gathered == len(gathered)
        assert 0 < chunk.size <= max(chunk_tokens, slices) and len(gathered) <= max(2 * chunk_tokens, slices)
        seen += tokens
    assert sorted(seen) == (list(range(T)) if kept is None else kept.tolist())


def test_neighbours_are_taken_without_a_copy():
    """A run of kept tokens is a slice: prompts in front of one answer cost no index_select."""
    chunks = plan_chunks(100, 1, 16, kept=torch.arange(40, 80), device=CPU)
    assert [(c.rows, c.tokens) for c in chunks] == [(slice(a, b),) * 2 for a, b in ((40, 56), (56, 72), (72, 80))]


def test_size_of_a_chunk():
    """Within the workspace, never below the tokens that GEMMs need, chunks of one size: 5000 tokens are 2 x 2560, not 4096 + 904."""
    assert chunk_size(5000, 2 * 131072, "cuda") == 2560
    assert chunk_size(2048, 2 * 131072, "cuda") == 2048
    assert chunk_size(65536, 2 * 16384, "cuda") == 32768  # 1 GiB of a TP8 shard
    assert chunk_size(8192, 2 * 262144, "cuda") == 2048
    assert chunk_size(10, 2 * 131072, "cuda") == 128  # rounded up: the buffer is as long as its longest chunk anyway
    assert chunk_size(0, 2 * 131072, "cuda") > 0
    assert chunk_size(2048, 2 * 32768, "cpu") == chunk_size(2048, 4 * 32768, "cpu") == 1024  # two at least: one would be all the logits
    assert chunk_size(32768, 4 * 32768, "cpu") == 1024  # 128 MiB
    assert chunk_size(2048, 4 * 262144, "cpu") == 256 == chunk_size(200, 4, "cpu")


@pytest.mark.parametrize("op", ["loss", "stats"])
@pytest.mark.parametrize("given", [False, True], ids=["derived", "rows"])
def test_masked_tokens_cost_nothing_and_send_nothing(op, given, device):
    """NaN and inf hidden states where masked, by label and by coefficient: the numbers of the live tokens alone, FLOP too."""
    T, H, V = 40, 16, 60
    hidden, weight, labels, inputs = problem(T, H, V)
    masked = torch.zeros(T, dtype=torch.bool)
    masked[[0, 1, 2, 9, 20, 21, 22, 23, 39]] = True
    labels[masked], inputs.coefficient[5], inputs.coefficient[20] = MASKED, 0.0, torch.nan
    masked[5] = True
    hidden[masked], hidden[9] = torch.nan, torch.inf
    inputs.advantage[masked] = torch.nan
    rows = (~masked).nonzero().view(-1) if given else None
    h, w = leaf(hidden, device), leaf(weight, device)
    coefficient = torch.ones(T)
    coefficient[5] = 0.0
    inputs = TokenInputs(coefficient=coefficient, advantage=inputs.advantage, old_logp=inputs.old_logp).map(lambda x: x.to(device))
    labels = labels.to(device)
    live_labels = labels if op == "loss" else labels.masked_fill(inputs.coefficient == 0, MASKED)
    with GemmFlop() as counter:
        if op == "loss":
            out = linear_token_loss(h, w, labels, "luffy", inputs=inputs, plan=Plan(chunk_tokens=7, rows=rows))
            out.loss_sum.backward()
            assert int(out.num_tokens) == 30 and not out.per_token.logp[masked].any()
        else:
            stats = linear_token_stats(h, w, live_labels, plan=Plan(chunk_tokens=7, rows=rows))
            stats.logp.sum().backward()
            assert not stats.lse[masked].any()
    if given or device.type == "cpu":
        assert counter.flop == (3 if op == "loss" else 4) * 2 * 30 * H * V
    assert not h.grad[masked].any() and h.grad[~masked].any(1).all()
    keep = (~masked).nonzero().view(-1)
    alone = inputs.map(lambda x: x.cpu()[keep])
    if op == "loss":
        truth, grads = dense(hidden[keep], weight, labels.cpu()[keep], "luffy", inputs=alone)
        torch.testing.assert_close(out.loss_sum.cpu().double(), truth.loss_sum, atol=30 * tol.LINEAR_VALUES, rtol=tol.LINEAR_VALUES)
    else:
        _, grads = dense(hidden[keep], weight, labels.cpu()[keep], "sft")
        grads = {name: -x for name, x in grads.items()}
    assert distance(h.grad[keep], grads["hidden"]) <= tol.LINEAR_GRAD and distance(w.grad, grads["weight"]) <= tol.LINEAR_GRAD


@pytest.mark.parametrize("op", ["loss", "stats"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_masked_tokens_inside_chunks(op, backend):
    """What a GPU does without rows, where looking for masked tokens would stall: NaN hidden states pass the GEMMs as zeros."""
    hidden, weight, labels, inputs = problem(20, 16, 60)
    live = torch.rand(20) < 0.6
    labels[~live] = MASKED
    hidden[~live] = torch.nan
    h, w, b = leaf(hidden), leaf(weight), torch.randn(60, requires_grad=True)
    sweep = Sweep(plan_chunks(20, 1, 6, kept=None, device=CPU), Shard(0, 60, MASKED, 1.0), torch.float32, masked_inside=True)
    with use_backend(backend):
        if op == "loss":
            objective, own = objective_of(bind("dft"), TokenInputs())
            value, _ = linear_token_loss_table(h, w, b, labels, sweep, objective, len(COLUMNS) + len(own))
        else:
            logp = swept_token_stats(h, w, b, labels, sweep).logp
            value = -(logp.detach().exp() * logp).sum()
        value.backward()
    truth, grads = dense(hidden, weight, labels, "dft", head=Head(b.detach()))
    assert not h.grad[~live].any()
    for x, name in ((h, "hidden"), (w, "weight"), (b, "bias")):
        assert distance(x.grad, grads[name]) <= tol.LINEAR_GRAD


def test_a_true_zero_weight_keeps_its_rows_out_of_nothing():
    """A live token whose loss weighs 0 still counts: num_tokens and metrics see it."""
    hidden, weight, labels, inputs = problem(20, 16, 60)
    labels = labels.clamp(min=0)
    inputs = TokenInputs(advantage=torch.zeros(20))
    out = linear_token_loss(leaf(hidden), weight, labels, "grpo", inputs=inputs, plan=Plan(min_weight=1e-3))
    assert int(out.num_tokens) == 20 and (out.per_token.logp < 0).all() and float(out.metric_sums["nll"]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_light_tokens_leave_the_backward_gemms(dtype, device):
    """min_weight drops exactly the gradient of the tokens below it; loss and metrics stay.  |dz| <= sqrt(2) max(|a|) without entropy."""
    T, H, V, limit = 60, 16, 50, 0.05
    hidden, weight, labels, inputs = problem(T, H, V, dtype=dtype)
    inputs = TokenInputs(coefficient=inputs.coefficient)
    results, bound_of_gemm = {}, tol.LINEAR_CHUNKS if dtype == torch.float32 else 2.0**-7  # other shapes, other order of summation
    for threshold in (0.0, 1e-30, limit):
        h, w = leaf(hidden, device), leaf(weight, device)
        with GemmFlop() as counter:
            given = inputs.map(lambda x: x.to(device))
            out = linear_token_loss(h, w, labels.to(device), "dft", inputs=given, plan=Plan(chunk_tokens=13, min_weight=threshold, grad_scale=7.0))
            (out.loss_sum * 7).backward()
        results[threshold] = out, h.grad.cpu(), w.grad.cpu(), counter.flop
    exact, none, some = results[0.0], results[1e-30], results[limit]
    assert torch.equal(none[1], exact[1]) and torch.equal(none[2], exact[2])
    reach = (exact[0].per_token.weight.cpu() * inputs.coefficient).where(labels != MASKED, 0.0)  # of DFT: |a| = p x coefficient
    light = (reach < limit) & (reach > 0)
    assert 5 < light.sum() < 50 and torch.equal(some[0].loss_sum, exact[0].loss_sum)
    assert not some[1][light].any() and distance(some[1][~light], exact[1][~light]) <= bound_of_gemm
    alone = TokenInputs(coefficient=inputs.coefficient.masked_fill(light, 0.0) * 7)
    _, grads = dense(hidden, weight, labels, "dft", inputs=alone)
    assert distance(some[2], grads["weight"]) <= (tol.LINEAR_GRAD if dtype == torch.float32 else 2e-2)
    bound = 7 * math.sqrt(2) * limit * hidden[light].double().norm(dim=1).sum()
    assert 0 < (some[2].double() - exact[2].double()).norm() <= bound
    live = int(exact[0].num_tokens)
    assert some[3] == 2 * H * V * (live + 2 * (live - int(light.sum()))) < exact[3] == 2 * H * V * 3 * live


def test_no_token_weighs_enough():
    hidden, weight, labels, _ = problem()
    h, w = leaf(hidden), leaf(weight)
    linear_token_loss(h, w, labels, "dft", plan=Plan(min_weight=1e3, chunk_tokens=8)).loss_sum.backward()
    assert not h.grad.any() and not w.grad.any()


def test_a_nan_weight_is_not_light():
    """NaN < min_weight is false, and must stay visible."""
    hidden, weight, labels, _ = problem()
    hidden[7] = torch.nan
    h, w = leaf(hidden), leaf(weight)
    linear_token_loss(h, w, labels, "dft", plan=Plan(min_weight=1e-3)).loss_sum.backward()
    assert h.grad[7].isnan().all() and w.grad.isnan().any()


def test_rows_may_hold_masked_tokens():
    """A superset of the live tokens, as a data layer that masks by document gives."""
    hidden, weight, labels, _ = problem()
    rows = torch.arange(2, 37)
    labels[:2] = MASKED
    h, w = leaf(hidden), leaf(weight)
    linear_token_loss(h, w, labels, "dft", plan=Plan(rows=rows, chunk_tokens=8)).loss_sum.backward()
    _, grads = dense(hidden, weight, labels, "dft")
    assert distance(h.grad, grads["hidden"]) <= tol.LINEAR_GRAD and distance(w.grad, grads["weight"]) <= tol.LINEAR_GRAD
