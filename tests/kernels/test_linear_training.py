"""Hidden-in ops inside a training step: dW into main_grad, the upstream scale, recompute, evaluation, tied weights, errors that must be seen."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_plugin import MainGrad, Plan, TokenTerms, bind, linear_token_loss, linear_token_stats
from tests import tolerances as tol
from tests.kernels.linear_oracle import LargestTensor, dense, distance, leaf, problem

T, H, V = 37, 24, 101


def parameter(weight, main_grad=torch.float32, **attributes) -> torch.nn.Parameter:
    """A weight as megatron-core's DDP leaves it."""
    p = torch.nn.Parameter(weight.clone())
    p.grad_added_to_main_grad = False
    if main_grad is not None:
        p.main_grad = torch.zeros_like(weight, dtype=main_grad)
    for name, value in attributes.items():
        setattr(p, name, value)
    return p


def ddp_hook(p):
    """megatron-core's distributed_data_parallel.py, _make_backward_post_hook, without the reduction: a list that grows when it fires."""
    fired = []

    def hook(*_):
        assert p.grad is not None, "overlap_grad_reduce needs a gradient"
        if not p.grad_added_to_main_grad or getattr(p, "zero_out_wgrad", False):
            p.main_grad.add_(p.grad.data)
        p.grad = None
        fired.append(True)

    p.register_post_accumulate_grad_hook(hook)
    return fired


def loss_of(op, hidden, weight, labels, **plan):
    if op == "loss":
        return linear_token_loss(hidden, weight, labels, "dft", plan=Plan(**plan)).loss_sum
    logp = linear_token_stats(hidden, weight, labels, plan=Plan(**plan)).logp
    return -(logp.detach().exp() * logp).sum()


OPS = pytest.mark.parametrize("op", ["loss", "stats"])


@OPS
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)  # fmt: skip
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_main_grad_holds_what_a_gradient_of_its_own_would(op, dtypes, chunk_tokens, device):
    """On top of what it held, over two micro-batches; the parameter's hook fires each time and adds nothing."""
    dtype, main_dtype = dtypes
    hidden, weight, labels, _ = (x.to(device) if isinstance(x, torch.Tensor) else x for x in problem(T, H, V, dtype=dtype))
    p = parameter(weight, main_dtype)
    p.main_grad += 1.0
    ledger, fired, total = MainGrad(p), ddp_hook(p), torch.ones(V, H, dtype=torch.float64)
    for part in (slice(0, 20), slice(20, T)):
        h, own_h, own_w = leaf(hidden[part], device), leaf(hidden[part], device), leaf(weight, device)
        loss_of(op, h, p, labels[part], chunk_tokens=chunk_tokens, main_grad=ledger).backward()
        loss_of(op, own_h, own_w, labels[part], chunk_tokens=chunk_tokens).backward()
        assert torch.equal(h.grad, own_h.grad)
        total += dense(hidden[part].cpu(), weight.cpu(), labels[part].cpu(), "dft")[1]["weight"]
        assert distance(own_w.grad, dense(hidden[part].cpu(), weight.cpu(), labels[part].cpu(), "dft")[1]["weight"]) < 0.02
    ledger.finalize()
    assert fired == [True, True] and p.grad_added_to_main_grad
    bound = {(torch.float32, torch.float32): tol.LINEAR_GRAD}.get(dtypes, 2.0**-7)
    assert distance(p.main_grad, total) <= bound


@OPS
def test_main_grad_is_the_only_sum(op):
    """bf16 weight, fp32 main_grad: no other tensor of the weight's size in forward or backward, the placeholder included."""
    hidden, weight, labels, _ = problem(64, 2048, 2000, dtype=torch.bfloat16)
    p, h = parameter(weight), leaf(hidden)
    ledger = MainGrad(p)
    with LargestTensor(but=(p, p.main_grad)) as seen:
        loss = loss_of(op, h, p, labels, chunk_tokens=8, main_grad=ledger)
        loss.backward()
    assert seen.largest <= 2**20 < weight.numel() and p.grad.is_sparse and p.grad._nnz() == 0  # 2^20: blocks of dW
    ledger.finalize()


@OPS
def test_a_tied_weight(op):
    """One parameter, embedding and head: both gradients arrive, without DDP and with megatron-core's zero_out_wgrad."""
    _, weight, labels, _ = problem(T, H, V)
    ids = torch.randint(0, V, (T,))
    own = leaf(weight)
    loss_of(op, torch.nn.functional.embedding(ids, own) * 1.5, own, labels, chunk_tokens=10).backward()
    truth = weight.double().requires_grad_()
    h = torch.nn.functional.embedding(ids, truth) * 1.5
    logp = (h @ truth.t()).log_softmax(-1)
    live = labels != -100
    logp = logp.gather(1, labels.clamp(min=0)[:, None])[:, 0][live]
    (-(logp.detach().exp() * logp).sum()).backward()
    assert distance(own.grad, truth.grad) <= tol.LINEAR_GRAD

    p = parameter(weight, zero_out_wgrad=True)
    ledger, fired = MainGrad(p), ddp_hook(p)
    loss_of(op, torch.nn.functional.embedding(ids, p) * 1.5, p, labels, chunk_tokens=10, main_grad=ledger).backward()
    ledger.finalize()
    assert fired == [True] and distance(p.main_grad, truth.grad) <= tol.LINEAR_GRAD


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("main_grad", [False, True], ids=["own", "main_grad"])
def test_grad_scale_is_what_the_backward_brings(as_tensor, main_grad):
    """fp16's loss scale over micro-batches, say: formed in the forward, nothing left to multiply in the backward."""
    hidden, weight, labels, _ = problem(T, H, V)
    scale = 1024.0 / 3
    given = torch.tensor(scale) if as_tensor else scale
    p = parameter(weight)
    ledger, h = MainGrad(p), leaf(hidden)
    loss = loss_of("loss", h, p, labels, main_grad=ledger if main_grad else None, grad_scale=given)
    if as_tensor:
        given.fill_(5.0)  # next step's scale, set before this step's backward: what counts is the forward's
    (loss * 1024.0 / 3).backward()
    ledger.finalize()
    truth, grads = dense(hidden, weight, labels, "dft")
    assert loss.item() == pytest.approx(truth.loss_sum.item(), rel=1e-6), "the value is not scaled"
    assert distance(h.grad, scale * grads["hidden"]) <= tol.LINEAR_GRAD
    assert distance(p.main_grad if main_grad else p.grad, scale * grads["weight"]) <= tol.LINEAR_GRAD


@pytest.mark.parametrize("scale, upstream", [(1.0, 1.0), (1.0, 0.25), (4.0, 0.5), (1.0, 0.0), (1.0, -1.0)])
def test_any_upstream_gradient_with_a_gradient_of_its_own(scale, upstream):
    hidden, weight, labels, _ = problem(T, H, V)
    h, w = leaf(hidden), leaf(weight)
    (loss_of("loss", h, w, labels, grad_scale=scale) * upstream).backward()
    _, grads = dense(hidden, weight, labels, "dft")
    for x, name in ((h, "hidden"), (w, "weight")):
        assert (x.grad.double() - upstream * grads[name]).norm() <= tol.LINEAR_GRAD * grads[name].norm()


@pytest.mark.parametrize("upstream", [0.5, 0.0, float("nan")])
def test_a_scale_that_was_not_announced_is_found_at_the_end_of_the_step(upstream):
    """dW already lies in main_grad with the announced scale; the message has both numbers."""
    hidden, weight, labels, _ = problem(T, H, V)
    p = parameter(weight)
    ledger = MainGrad(p)
    (loss_of("loss", leaf(hidden), p, labels, main_grad=ledger, grad_scale=2.0) * upstream).backward()
    loss_of("loss", leaf(hidden), p, labels, main_grad=ledger, grad_scale=2.0).mul(2.0).backward()
    with pytest.raises(RuntimeError, match=rf"1 backward\(s\).*brought the upstream gradient {upstream:g}, expected plan.grad_scale = 2") as error:
        ledger.finalize()
    assert "Plan(grad_scale=...)" in str(error.value)
    ledger.finalize()  # the books are closed: the next step starts clean


def test_a_rounding_of_the_scale_is_no_stranger():
    hidden, weight, labels, _ = problem(T, H, V)
    p = parameter(weight)
    ledger = MainGrad(p)
    (loss_of("loss", leaf(hidden), p, labels, main_grad=ledger, grad_scale=1 / 3) * torch.tensor(1 / 3).nextafter(torch.tensor(1.0))).backward()
    ledger.finalize()


def test_a_dropped_loss_is_found_at_the_end_of_the_step():
    hidden, weight, labels, _ = problem(T, H, V)
    p = parameter(weight)
    ledger = MainGrad(p)
    loss_of("loss", leaf(hidden), p, labels, main_grad=ledger)
    with pytest.raises(RuntimeError, match=r"ran 1 forward\(s\) without a backward.*linear_token_stats"):
        ledger.finalize()
    ledger.finalize()


def test_a_forward_that_failed_half_way_is_found_too():
    """Its first chunks lie in main_grad already."""
    hidden, weight, labels, inputs = problem(T, H, V)
    calls = []

    def fails_late(stats, inputs):
        calls.append(len(stats.logp))
        if calls[-2:] == [10, 10]:
            raise KeyError("the loss of the second chunk")
        return TokenTerms(loss=-stats.logp)

    p = parameter(weight)
    ledger, loss = MainGrad(p), bind(fails_late)
    with pytest.raises(KeyError):
        linear_token_loss(leaf(hidden), p, labels.clamp(min=0), loss, plan=Plan(chunk_tokens=10, main_grad=ledger))
    assert p.main_grad.any()
    with pytest.raises(RuntimeError, match=r"ran 1 forward\(s\) without a backward"):
        ledger.finalize()


@OPS
def test_interleaved_micro_batches(op):
    """1F1B: forwards run ahead of their backwards."""
    hidden, weight, labels, _ = problem(T, H, V)
    p = parameter(weight)
    ledger = MainGrad(p)
    parts = [slice(0, 9), slice(9, 20), slice(20, T)]
    losses = [loss_of(op, leaf(hidden[part]), p, labels[part], main_grad=ledger, chunk_tokens=4) for part in parts]
    for loss in losses:
        loss.backward()
    ledger.finalize()
    assert distance(p.main_grad, dense(hidden, weight, labels, "dft")[1]["weight"]) <= tol.LINEAR_GRAD


@OPS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("behind", [False, True], ids=["head_last", "head_inside"])
@pytest.mark.parametrize("main_grad", [False, True], ids=["own", "main_grad"])
def test_activation_recompute_is_right_or_found(op, reentrant, behind, main_grad):
    """The head inside a checkpointed region.  Its forward must not add to main_grad twice unseen."""
    hidden, weight, labels, _ = problem(T, H, V)
    p, h = parameter(weight), leaf(hidden)
    ledger, one, runs = MainGrad(p), torch.ones((), requires_grad=True), []

    def region(x):
        runs.append(x)
        loss = loss_of(op, x * 2.0 if behind else x, p, labels, main_grad=ledger if main_grad else None, chunk_tokens=10)
        return loss * one if behind else loss  # a product saves the loss: recompute must run through the head

    loss = checkpoint(region, h, use_reentrant=reentrant)
    loss.backward()
    if op == "loss" and main_grad and not reentrant and behind:
        with pytest.raises(RuntimeError, match="activation recompute of the head"):
            ledger.finalize()
        return
    ledger.finalize()
    # the one-pass op saves nothing: last in its region, it needs no second run of it (and its own autograd on [T] vectors asks for none)
    assert len(runs) == (1 if op == "loss" and not reentrant and not behind else 2)
    z, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    _dft(z * 2.0 if behind else z, w, labels).backward()
    assert distance(h.grad, z.grad) <= 5 * tol.LINEAR_GRAD
    assert distance(p.main_grad if main_grad else p.grad, w.grad) <= 5 * tol.LINEAR_GRAD


def _dft(hidden, weight, labels):
    logp = (hidden @ weight.t()).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0][labels != -100]
    return -(logp.detach().exp() * logp).sum()


@OPS
def test_evaluation_writes_nothing(op):
    """no_grad, a frozen head: main_grad and the ledger stay as they are, values are the same."""
    hidden, weight, labels, _ = problem(T, H, V)
    p = parameter(weight)
    ledger, frozen = MainGrad(p), p.detach()
    trained = loss_of(op, leaf(hidden), p, labels)
    with torch.no_grad():
        value = loss_of(op, hidden, p, labels, main_grad=ledger)
    assert not value.requires_grad and value == trained.detach()
    p.requires_grad_(False)
    h = leaf(hidden)
    loss_of(op, h, p, labels, main_grad=ledger).backward()
    assert h.grad.any() and frozen.grad is None and not p.main_grad.any()
    ledger.finalize()


def test_a_second_backward_is_an_error():
    hidden, weight, labels, _ = problem(T, H, V)
    loss = loss_of("loss", leaf(hidden), leaf(weight), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward.*linear_token_stats"):
        loss.backward()


def test_a_second_backward_of_two_passes_adds_up():
    hidden, weight, labels, _ = problem(T, H, V)
    h, w = leaf(hidden), leaf(weight)
    loss = loss_of("stats", h, w, labels)
    loss.backward(retain_graph=True)
    once = w.grad.clone()
    loss.backward()
    assert distance(w.grad, 2 * once) <= 1e-7


def test_nothing_is_kept_after_the_backward():
    """dX and dW are handed out, not copied and not held."""
    hidden, weight, labels, _ = problem(T, H, V)
    h, w = leaf(hidden), leaf(weight)
    out = linear_token_loss(h, w, labels, "dft")
    node = out.loss_sum.grad_fn
    while "LinearTokenLoss" not in type(node).__name__:
        node = node.next_functions[0][0]
    held = node.gradients[1].data_ptr()
    out.loss_sum.backward()
    assert w.grad.data_ptr() == held and node.gradients is None
