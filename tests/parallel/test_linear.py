"""Hidden-in ops under tensor and sequence parallelism, in real gloo processes: every split gives the dense numbers."""

import pytest
import torch

from megatron_plugin import Head, TokenInputs, bind
from tests import tolerances as tol
from tests.kernels.linear_oracle import MASKED, dense, distance, problem
from tests.spawn import on_ranks

RANKS = "tests.parallel.linear_ranks"
H, V = 16, 96
# tokens 12 = 2 x 2 x 3 = 3 x 2 x 2 = 4 x 3 x 1: [S, b] with S divisible by the ranks
SHAPE = {2: (4, 3), 3: (6, 2), 4: (12, 1)}
BOUNDS = {"2": (0, 48, 96), "2 uneven": (0, 1, 96), "3": (0, 32, 64, 96), "3 uneven": (0, 40, 41, 96), "4": (0, 24, 48, 72, 96)}


def _problem(ranks, dtype=torch.float32):
    S, b = SHAPE[ranks]
    hidden, weight, labels, inputs = problem(S * b, H, V, dtype=dtype)
    inputs = {"coefficient": inputs.coefficient, "advantage": inputs.advantage}
    labels = labels.masked_fill(inputs["coefficient"] == 0, MASKED)
    # a row of slices with one live token, one with none
    labels.view(S, b)[0] = MASKED
    return hidden.view(S, b, H), weight, labels.view(S, b), {k: x.view(S, b) for k, x in inputs.items()}


def _check(results, truth, bounds, *, sequence_parallel, bound=tol.LINEAR_GRAD):
    out, grads = truth
    ranks = len(results)
    for rank, (loss, tokens, logp, dx, dw, db) in enumerate(results):
        assert tokens == int(out.num_tokens)
        assert torch.equal(loss, results[0][0]) and torch.equal(logp, results[0][2]), "ranks must hold the same bits"
        torch.testing.assert_close(loss.double(), out.loss_sum.detach().double(), atol=20 * tol.LINEAR_VALUES, rtol=bound)
        share = grads["hidden"].chunk(ranks)[rank] if sequence_parallel else grads["hidden"]
        assert distance(dx, share) <= bound
        mine = slice(bounds[rank], bounds[rank + 1])
        assert (dw.double() - grads["weight"][mine]).norm() <= bound * grads["weight"].norm()
        if db is not None:
            assert (db.double() - grads["bias"][mine]).norm() <= bound * grads["bias"].norm()


@pytest.mark.parametrize("op", ["loss", "stats"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("split", BOUNDS)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 5])
def test_every_split_equals_dense(op, sequence_parallel, split, chunk_tokens):
    """Uneven shards, one of a single column; chunks that end inside slices; rows of a slice without a live token."""
    bounds, ranks = BOUNDS[split], int(split[0])
    hidden, weight, labels, inputs = _problem(ranks)
    call = dict(hidden=hidden, weight=weight, labels=labels, op=op, loss="luffy", params=dict(entropy_bonus=0.1), inputs=inputs, bounds=bounds)
    plan = dict(chunk_tokens=chunk_tokens)
    results = on_ranks(ranks, RANKS, "gradients", **call, sequence_parallel=sequence_parallel, vocab_size=None, plan=plan)
    _check(results, dense(hidden, weight, labels, bind("luffy", entropy_bonus=0.1), inputs=TokenInputs(**inputs)), bounds,
           sequence_parallel=sequence_parallel)  # fmt: skip


def test_ranks_with_unequal_shards_cut_the_same_chunks():
    """Each chunk is a collective: a size from this rank's own columns would leave the ranks waiting for each other."""
    hidden, weight, labels, inputs = problem(512, H, V, dtype=torch.float32)
    inputs, labels = {"coefficient": torch.ones(512), "advantage": inputs.advantage}, labels.clamp(min=0)
    call = dict(hidden=hidden, weight=weight, labels=labels, op="loss", loss="luffy", params={}, inputs=inputs, vocab_size=None)
    workspace = (256 * 48 * 4, 128, 1)  # bytes for 256 tokens of half the vocabulary: 4 chunks of a rank with 95 columns, 1 with one
    results = on_ranks(2, RANKS, "gradients", **call, bounds=BOUNDS["2 uneven"], sequence_parallel=False, plan={}, workspace=workspace)
    _check(results, dense(hidden, weight, labels, bind("luffy"), inputs=TokenInputs(**inputs)), BOUNDS["2 uneven"], sequence_parallel=False)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("dtype, main_grad", [(torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str)
def test_dtypes_padding_bias_and_main_grad(sequence_parallel, dtype, main_grad):
    """Megatron's padded vocabulary: the second rank ends inside its shard; rows given by the data layer."""
    hidden, weight, labels, inputs = _problem(2, dtype)
    labels, bias = labels.clamp(max=89), torch.linspace(-1, 1, V).to(dtype)
    weight[90:] *= 20
    call = dict(hidden=hidden, weight=weight, labels=labels, op="loss", loss="dft", params={}, inputs=inputs, bounds=BOUNDS["2"], bias=bias)
    plan = dict(chunk_tokens=4, rows=(labels.view(-1) != MASKED).nonzero().view(-1))
    results = on_ranks(2, RANKS, "gradients", **call, sequence_parallel=sequence_parallel, vocab_size=90, plan=plan, main_grad=main_grad)
    head = Head(bias, vocab_size=90)
    truth = dense(hidden, weight, labels, "dft", inputs=TokenInputs(**inputs), head=head)
    bound = tol.LINEAR_FP64 if dtype == torch.float64 else 3 * tol.LINEAR_FP32_LOGITS
    _check(results, truth, BOUNDS["2"], sequence_parallel=sequence_parallel, bound=bound)
    assert not results[1][4][42:].any()


def test_light_rows_are_the_same_on_every_rank():
    """min_weight under TP and SP: a rank that kept another row would wait for ever, or sum different tokens."""
    hidden, weight, labels, inputs = _problem(2)
    inputs = {"coefficient": inputs["coefficient"]}
    call = dict(hidden=hidden, weight=weight, labels=labels, op="loss", loss="dft", params={}, inputs=inputs, bounds=BOUNDS["2"], vocab_size=None)
    limit = 0.1
    exact, _ = dense(hidden, weight, labels, "dft", inputs=TokenInputs(**inputs))
    light = exact.per_token.weight.view(labels.shape) * inputs["coefficient"] < limit
    kept = TokenInputs(coefficient=inputs["coefficient"].masked_fill(light, 0.0))
    _, grads = dense(hidden, weight, labels, "dft", inputs=kept)
    assert 0 < int((light & (labels != MASKED)).sum()) < int(exact.num_tokens)
    for sequence_parallel in (False, True):
        plan = dict(chunk_tokens=5, min_weight=limit)
        results = on_ranks(2, RANKS, "gradients", **call, sequence_parallel=sequence_parallel, plan=plan)
        _check(results, (exact, grads), BOUNDS["2"], sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_the_collectives_of_a_step(sequence_parallel):
    """One-pass, per chunk: statistics, dX, and with SP the hidden states; the backward is silent.  Two-pass: statistics once.

    No transfer is larger than a chunk, and 12 tokens in chunks of 4 are 3 chunks.
    """
    hidden, weight, labels, inputs = _problem(2)
    labels = labels.clamp(min=0)
    inputs = {"coefficient": torch.ones_like(inputs["coefficient"])}
    call = dict(hidden=hidden, weight=weight, labels=labels, loss="dft", params={}, inputs=inputs, bounds=BOUNDS["2"], vocab_size=None)
    call |= dict(sequence_parallel=sequence_parallel, plan=dict(chunk_tokens=4))
    statistics, whole = ("all_gather_single", 2 * (4 + 1) * 4), ("all_gather_single", 2 * (12 + 1) * 4)  # and a row that says which columns
    gathered = [("all_gather_single", 4 * H)] if sequence_parallel else []
    reduced = ("reduce_scatter_single", 2 * H) if sequence_parallel else ("all_reduce", 4 * H)
    for forward, backward in on_ranks(2, RANKS, "collectives", **call, op="loss"):
        assert sorted(forward) == sorted([statistics, reduced, *gathered] * 3) and backward == []
        if not sequence_parallel:
            assert forward == [statistics, reduced] * 3
    for forward, backward in on_ranks(2, RANKS, "collectives", **call, op="stats"):
        assert sorted(forward) == sorted([whole, *gathered * 3]) and sorted(backward) == sorted([reduced, *gathered] * 3)


def test_rows_without_a_live_token_are_not_gathered():
    """SP and an index of live tokens: slices send the rows that some slice needs, [2 rows of both slices, H] at most per chunk."""
    hidden, weight, labels, inputs = _problem(2)
    labels = torch.full_like(labels, MASKED)
    labels.view(-1)[[0, 3, 11]] = 5  # row 0 of the first slice, row 3 of the first, row 5 of the second: three rows, three tokens
    call = dict(hidden=hidden, weight=weight, labels=labels, loss="sft", params={}, inputs={}, bounds=BOUNDS["2"], vocab_size=None, op="loss")
    for forward, _ in on_ranks(2, RANKS, "collectives", **call, sequence_parallel=True, plan={}):
        assert sorted(forward) == sorted([("all_gather_single", 6 * H), ("all_gather_single", 2 * (3 + 1) * 4), ("reduce_scatter_single", 3 * H)])


def test_what_does_not_fit():
    hidden, weight, labels, inputs = _problem(2)
    call = dict(weight=weight, op="loss", loss="dft", params={}, inputs={}, bounds=BOUNDS["2"], vocab_size=None, plan={})
    # hidden states that are not split, labels that are
    for message in on_ranks(2, RANKS, "error", **call, hidden=hidden, labels=labels[:2], sequence_parallel=False):
        assert "labels [2, 3] do not fit hidden [4, 3, 16]: expected [4, 3]" in message
    for message in on_ranks(2, RANKS, "error", **call, hidden=hidden, labels=labels[:2], sequence_parallel=True):
        assert "labels [2, 3] do not fit hidden [2, 3, 16]: expected [4, 3]" in message
    for message in on_ranks(2, RANKS, "error", **call | dict(bounds=(0, 10, 30)), hidden=hidden, labels=labels.clamp(max=29), sequence_parallel=False):
        assert message is None
