"""Hidden-in ops against dense logits in fp64: every loss, dtype, chunk size and head; one-pass and two-pass."""

import pytest
import torch

from megatron_plugin import LOSSES, Head, Plan, TokenInputs, bind, linear_token_loss, linear_token_stats
from megatron_plugin.kernels.backend import use_backend
from megatron_plugin.losses.contract import TokenTerms
from megatron_plugin.losses.reduction import evaluate_loss
from tests import tolerances as tol
from tests.kernels.linear_oracle import MASKED, GemmFlop, LargestTensor, dense, distance, leaf, problem

BACKENDS = ("auto", "triton")
FP32, FP64 = dict(values=tol.LINEAR_VALUES, gradients=tol.LINEAR_GRAD), dict(values=tol.LINEAR_FP64, gradients=tol.LINEAR_FP64)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def one_pass(hidden, weight, labels, loss, *, inputs=None, head=None, device="cpu", **plan):
    """(LossOutput, gradients by name) on leaves of their own."""
    head = head or Head()
    leaves = {"hidden": leaf(hidden, device), "weight": leaf(weight, device)} | ({} if head.bias is None else {"bias": leaf(head.bias, device)})
    head = Head(leaves.get("bias"), head.softcap, head.temperature, head.vocab_size)
    given = None if inputs is None else inputs.map(lambda x: x.to(device))
    out = linear_token_loss(leaves["hidden"], leaves["weight"], labels.to(device), loss, inputs=given, head=head, plan=Plan(**plan))
    out.loss_sum.backward()
    return out, {name: x.grad for name, x in leaves.items()}


def two_pass(hidden, weight, labels, loss, *, inputs=None, head=None, device="cpu", **plan):
    head, inputs = head or Head(), (inputs or TokenInputs()).map(lambda x: x.to(device))
    leaves = {"hidden": leaf(hidden, device), "weight": leaf(weight, device)} | ({} if head.bias is None else {"bias": leaf(head.bias, device)})
    labels = labels.to(device)
    live = labels != MASKED if inputs.coefficient is None else (labels != MASKED) & (inputs.coefficient != 0)
    head = Head(leaves.get("bias"), head.softcap, head.temperature, head.vocab_size)
    stats = linear_token_stats(leaves["hidden"], leaves["weight"], labels.masked_fill(~live, MASKED), head=head, plan=Plan(**plan))
    out = evaluate_loss(bind(loss).for_vocabulary(head.vocab_size or weight.shape[0]), stats, inputs, live)
    out.loss_sum.backward()
    return out, {name: x.grad for name, x in leaves.items()}


def check(got, truth, *, values, gradients):
    (out, grads), (true_out, true_grads) = got, truth
    assert int(out.num_tokens) == int(true_out.num_tokens)
    for name, column in out.per_token._asdict().items():
        torch.testing.assert_close(column.cpu().double().view(-1), getattr(true_out.per_token, name).double(), atol=values, rtol=values, msg=name)
    assert list(out.metric_sums) == list(true_out.metric_sums)
    sums = values * max(1, int(out.num_tokens))
    for name, value in (out.metric_sums | {"loss_sum": out.loss_sum.detach()}).items():
        true_value = (true_out.metric_sums | {"loss_sum": true_out.loss_sum.detach()})[name]
        torch.testing.assert_close(value.cpu().double(), true_value.double(), atol=sums, rtol=values, msg=name)
    for name, truth in true_grads.items():
        assert distance(grads[name], truth) <= gradients, (name, distance(grads[name], truth))


@pytest.mark.parametrize("way", [one_pass, two_pass])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"gspo", "srft"}))  # these two read inputs.extra: tests/losses/
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_loss_matches_dense_fp64(way, backend, loss, dtype, device):
    """With both regularisers; chunks of 8 of 37 tokens, so every per-token input crosses chunk borders."""
    if backend == "triton" and dtype == torch.float64:
        backend = "eager"  # Triton takes no fp64
    hidden, weight, labels, inputs = problem(dtype=dtype)
    loss = bind(loss, entropy_bonus=0.1, z_loss=0.01)
    with use_backend(backend):
        got = way(hidden, weight, labels, loss, inputs=inputs, device=device, chunk_tokens=8)
    bounds = FP64 if dtype == torch.float64 else FP32
    check(got, dense(hidden, weight, labels, loss, inputs=inputs), **bounds)


@pytest.mark.parametrize("way", [one_pass, two_pass])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 100, 16])
def test_half_precision_is_no_worse_than_dense_half_precision(way, dtype, chunk_tokens, device):
    """One chunk, three (a sum in half precision would round twice), many; the rival rounds its logits and gradients as we do."""
    hidden, weight, labels, inputs = problem(300, 64, 501, dtype=dtype)
    truth = dense(hidden, weight, labels, "dft", inputs=inputs)
    got = way(hidden, weight, labels, "dft", inputs=inputs, device=device, chunk_tokens=chunk_tokens)
    rival = dense(hidden, weight, labels, "dft", inputs=inputs, dtype=dtype)
    for name, gradient in truth[1].items():
        assert got[1][name].dtype == dtype
        assert distance(got[1][name], gradient) <= tol.EAGER_FACTOR * distance(rival[1][name], gradient), name
    logp_error, rival_error = ((x[0].per_token.logp.cpu().double() - truth[0].per_token.logp).abs().mean() for x in (got, rival))
    assert logp_error <= tol.EAGER_FACTOR * rival_error


@pytest.mark.parametrize("way", [one_pass, two_pass])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_chunk_changes_nothing(way, dtype, device):
    """1: one row per GEMM; 3: a last chunk of one row; T; beyond T."""
    hidden, weight, labels, inputs = problem(37, dtype=dtype)
    bound = tol.LINEAR_FP64 if dtype == torch.float64 else tol.LINEAR_CHUNKS
    whole, whole_grads = way(hidden, weight, labels, "idft", inputs=inputs, device=device)
    for chunk_tokens in (1, 3, 37, 1000):
        out, grads = way(hidden, weight, labels, "idft", inputs=inputs, device=device, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(out.per_token.logp, whole.per_token.logp, atol=bound, rtol=bound)
        for name, gradient in whole_grads.items():
            assert distance(grads[name], gradient) <= bound


HEADS = {
    "bias": dict(bias=True),
    "softcap": dict(softcap=3.0),  # the logits reach 10
    "temperature": dict(temperature=0.7),
    "padded": dict(vocab_size=97),  # the last 4 columns are no tokens and full of anything
    "all": dict(bias=True, softcap=5.0, temperature=1.7, vocab_size=97),
}


@pytest.mark.parametrize("way", [one_pass, two_pass])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head(way, kind, dtype, device):
    hidden, weight, labels, inputs = problem(37 if dtype.itemsize > 2 else 300, dtype=dtype)  # of 37, a bias column hangs on single roundings
    options = dict(HEADS[kind])
    if options.pop("bias", False):
        options["bias"] = torch.linspace(-2, 2, len(weight)).to(dtype)
    head = Head(**options)
    labels = labels.clamp(max=96)
    weight[97:] *= 20 if head.vocab_size else 1
    got = way(hidden, weight, labels, "idft", inputs=inputs, head=head, device=device, chunk_tokens=len(labels) // 4)
    truth = dense(hidden, weight, labels, "idft", inputs=inputs, head=head)
    if dtype in (torch.float64, torch.float32):
        bounds = FP64 if dtype == torch.float64 else FP32
        check(got, truth, **bounds)
    else:
        rival = dense(hidden, weight, labels, "idft", inputs=inputs, head=head, dtype=dtype)
        for name, gradient in truth[1].items():
            assert distance(got[1][name], gradient) <= tol.EAGER_FACTOR * distance(rival[1][name], gradient), name
    if head.vocab_size:
        assert not got[1]["weight"][97:].any()


@pytest.mark.parametrize("way", [one_pass, two_pass])
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_logits_of_bf16_hidden_states(way, softcap, backend, device):
    """Their statistics are as good as in fp32; V odd, so rows of logits and gradient are padded apart."""
    hidden, weight, labels, inputs = problem(20, 32, 501, dtype=torch.bfloat16)
    head = Head(softcap=softcap)
    with use_backend(backend):
        out, grads = way(hidden, weight, labels, "dft", inputs=inputs, head=head, device=device, chunk_tokens=7, logits_dtype=torch.float32)
        rounded, _ = way(hidden, weight, labels, "dft", inputs=inputs, head=head, device=device, chunk_tokens=7)
    truth, true_grads = dense(hidden, weight, labels, "dft", inputs=inputs, head=head)
    torch.testing.assert_close(out.per_token.logp.cpu().double(), truth.per_token.logp, atol=tol.LINEAR_VALUES, rtol=tol.LINEAR_VALUES)
    assert (rounded.per_token.logp.cpu().double() - truth.per_token.logp).abs().max() > 100 * tol.LINEAR_VALUES
    for name, gradient in true_grads.items():
        assert grads[name].dtype == torch.bfloat16 and distance(grads[name], gradient) <= tol.LINEAR_FP32_LOGITS


@pytest.mark.parametrize("way", [one_pass, two_pass])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_each_time(way, dtype, device):
    hidden, weight, labels, inputs = problem(100, 64, 501, dtype=dtype)
    first, again = (way(hidden, weight, labels, "idft", inputs=inputs, device=device, chunk_tokens=16) for _ in range(2))
    assert torch.equal(first[0].loss_sum, again[0].loss_sum) and all(torch.equal(first[1][name], again[1][name]) for name in first[1])


@pytest.mark.parametrize("way, gemms", [(one_pass, 3), (two_pass, 4)])
def test_gemms_of_a_step(way, gemms):
    """2 T H V FLOP each: the logits once (twice in two passes), dX, dW."""
    hidden, weight, labels, _ = problem(64, 16, 200)
    labels = labels.clamp(min=0)
    with GemmFlop() as counter:
        way(hidden, weight, labels, "dft", chunk_tokens=10)
    assert counter.flop == gemms * 2 * 64 * 16 * 200


@pytest.mark.parametrize("needed", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
@pytest.mark.parametrize("op", ["loss", "stats"])
def test_only_the_gradients_that_are_needed(op, needed):
    """A frozen head runs no dW GEMM, frozen hidden states no dX GEMM; what is formed is the same."""
    hidden, weight, labels, _ = problem(12, 16, 50)
    labels, bias = labels.clamp(min=0), torch.randn(50)
    tensors = [x.clone().requires_grad_(bool(n)) for x, n in zip((hidden, weight, bias), needed, strict=True)]
    with GemmFlop() as counter:
        if op == "loss":
            value = linear_token_loss(*tensors[:2], labels, "dft", head=Head(tensors[2]), plan=Plan(chunk_tokens=5)).loss_sum
        else:
            logp = linear_token_stats(*tensors[:2], labels, head=Head(tensors[2]), plan=Plan(chunk_tokens=5)).logp
            value = -(logp.detach().exp() * logp).sum()
        assert value.requires_grad == any(needed)
        if any(needed):
            value.backward()
    recomputed = int(op == "stats" and any(needed))
    assert counter.flop == (1 + recomputed + needed[0] + needed[1]) * 2 * 12 * 16 * 50
    _, truth = dense(hidden, weight, labels, "dft", head=Head(bias))
    for x, n, name in zip(tensors, needed, truth, strict=True):
        assert (x.grad is not None) == bool(n)
        if n:
            assert distance(x.grad, truth[name]) <= tol.LINEAR_GRAD


@pytest.mark.parametrize("way", [one_pass, two_pass])
def test_the_logits_never_exist_as_a_whole(way):
    T, H, V = 512, 8, 600
    hidden, weight, labels, _ = problem(T, H, V)
    with LargestTensor() as seen:
        way(hidden, weight, labels, "dft", chunk_tokens=32)
    assert seen.largest == 32 * 600


@pytest.mark.parametrize("op", ["loss", "stats"])
@pytest.mark.parametrize("T", [0, 1, 6])
def test_nothing_to_learn(op, T, device):
    """No tokens, or all of them masked: 0, with gradients of 0, so that every rank meets the collectives of the backward."""
    hidden, weight = torch.full((T, 8), torch.nan, device=device).requires_grad_(), torch.randn(30, 8, device=device).requires_grad_()
    labels = torch.full((T,), MASKED, device=device)
    if op == "loss":
        out = linear_token_loss(hidden, weight, labels, "idft")
        assert int(out.num_tokens) == 0 and all(float(x) == 0 for x in out.metric_sums.values())
        value = out.loss_sum
    else:
        stats = linear_token_stats(hidden, weight, labels)
        assert all(x.shape == (T,) and not x.any() for x in stats)
        value = stats.logp.sum() + stats.entropy.sum()
    assert value == 0
    value.backward()
    assert hidden.grad.shape == hidden.shape and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("way", [one_pass, two_pass])
def test_one_token(way, device):
    hidden, weight, labels, inputs = problem(1)
    check(way(hidden, weight, labels, "chord_phi", inputs=inputs, device=device), dense(hidden, weight, labels, "chord_phi", inputs=inputs),
          **FP32)  # fmt: skip


@pytest.mark.parametrize("way", [one_pass, two_pass])
def test_any_shape_and_stride(way, device):
    """[S, b, H] hidden states, transposed in memory; a head that is a transposed and sliced matrix."""
    flat, weight, labels, inputs = problem(24, 16, 60)
    hidden = flat.view(3, 8, 16).transpose(0, 1)
    labels, inputs = labels.view(3, 8).t(), inputs.map(lambda x: x.view(3, 8).t())
    stored = torch.randn(20, 70)
    stored[:16, 5:65] = weight.t()
    truth = dense(hidden, weight, labels, "grpo", inputs=inputs)
    h, w = leaf(hidden, device), leaf(stored, device)
    given = inputs.map(lambda x: x.to(device))
    out = linear_token_loss(h, w[:16, 5:65].t(), labels.to(device), "grpo", inputs=given, plan=Plan(chunk_tokens=7)) if way is one_pass else None
    if out is None:
        live = (labels != MASKED) & (inputs.coefficient != 0)
        stats = linear_token_stats(h, w[:16, 5:65].t(), labels.masked_fill(~live, MASKED).to(device), plan=Plan(chunk_tokens=7))
        flat_stats = type(stats)(*(x.reshape(-1) for x in stats))
        out = evaluate_loss(bind("grpo"), flat_stats, given.map(lambda x: x.reshape(-1)), live.reshape(-1).to(device))
    elif way is one_pass:
        assert out.per_token.logp.shape == (8, 3)
    out.loss_sum.backward()
    assert distance(h.grad, truth[1]["hidden"]) <= tol.LINEAR_GRAD
    assert distance(w.grad[:16, 5:65].t(), truth[1]["weight"]) <= tol.LINEAR_GRAD


def against_the_mean(stats, inputs):
    """Looks at other tokens."""
    live = inputs.coefficient != 0
    mean = stats.entropy.detach().sum() / live.sum().clamp(min=1)
    return TokenTerms(loss=-(stats.entropy.detach() / mean.clamp(min=1e-6)) * stats.logp)


def test_a_loss_that_looks_at_other_tokens_runs_in_two_passes():
    hidden, weight, labels, inputs = problem()
    loss = bind(against_the_mean)
    assert not loss.token_local
    got = one_pass(hidden, weight, labels, loss, inputs=inputs, chunk_tokens=8)
    check(got, dense(hidden, weight, labels, loss, inputs=inputs), **FP32)
    assert got[0].per_token.logp.shape == labels.shape


@pytest.mark.parametrize("way", [one_pass, two_pass])
def test_autocast_changes_nothing(way):
    hidden, weight, labels, inputs = problem()
    _, plain = way(hidden, weight, labels, "dft", inputs=inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, under = way(hidden, weight, labels, "dft", inputs=inputs)
    assert all(torch.equal(plain[name], under[name]) for name in plain)


@pytest.mark.parametrize("op", ["loss", "stats"])
def test_a_graph_break_under_compile(op):
    hidden, weight, labels, _ = problem()

    def step(h, w):
        h = h * 2.0
        if op == "loss":
            return linear_token_loss(h, w, labels, "dft").loss_sum * 0.5
        return linear_token_stats(h, w, labels).logp.sum() * 0.5

    leaves, others = [leaf(hidden), leaf(weight)], [leaf(hidden), leaf(weight)]
    step(*leaves).backward()
    torch.compile(step, backend="eager")(*others).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, others, strict=True))


@pytest.mark.parametrize("op", ["loss", "stats"])
def test_double_backward_is_an_error(op):
    hidden, weight, labels, _ = problem()
    h = leaf(hidden)
    value = linear_token_loss(h, weight, labels, "dft").loss_sum if op == "loss" else linear_token_stats(h, weight, labels).logp.sum()
    (gradient,) = torch.autograd.grad(value * torch.ones((), requires_grad=True), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
