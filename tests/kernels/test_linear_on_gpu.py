"""What only a GPU can show of the hidden-in ops: no waiting, capture in a graph, memory, fp32 sums by its own GEMM."""

import pytest
import torch

from megatron_plugin import MainGrad, Plan, TokenInputs, linear_token_loss, linear_token_stats
from megatron_plugin.kernels.gemm import accumulate_
from tests import tolerances as tol
from tests.kernels.linear_oracle import MASKED, dense, distance, leaf, problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def _on_gpu(T=300, H=64, V=1000, dtype=torch.bfloat16):
    hidden, weight, labels, inputs = problem(T, H, V, dtype=dtype)
    return hidden.to(CUDA), weight.to(CUDA), labels.to(CUDA), inputs.map(lambda x: x.to(CUDA))


def _step(op, h, w, labels, inputs, plan):
    if op == "loss":
        loss = linear_token_loss(h, w, labels, "idft", inputs=inputs, plan=plan).loss_sum
    else:
        logp = linear_token_stats(h, w, labels, plan=plan).logp
        loss = -(logp.detach().exp() * logp).sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("op", ["loss", "stats"])
@pytest.mark.parametrize("rows", [False, True])
def test_nothing_waits_for_the_gpu(op, rows):
    """rows come from the host and go up in one copy; min_weight, which waits once per chunk, is off."""
    hidden, weight, labels, inputs = _on_gpu()
    plan = Plan(chunk_tokens=100, rows=torch.arange(10, 290) if rows else None)
    h, w = leaf(hidden, CUDA), leaf(weight, CUDA)
    _step(op, h, w, labels, inputs, plan)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(op, h, w, labels, inputs, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_graph():
    """Fixed chunks, a scale as a 0-d tensor: replayed on other values it gives their loss and gradients."""
    hidden, weight, labels, inputs = _on_gpu()
    h, w, scale = leaf(hidden, CUDA), leaf(weight, CUDA), torch.ones((), device=CUDA)
    plan = Plan(chunk_tokens=100, grad_scale=scale)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            h.grad = w.grad = None
            linear_token_loss(h, w, labels, "idft", inputs=inputs, plan=plan).loss_sum.mul(scale).backward()
    torch.cuda.current_stream().wait_stream(stream)
    h.grad = w.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = linear_token_loss(h, w, labels, "idft", inputs=inputs, plan=plan).loss_sum
        loss.mul(scale).backward()
    other, other_weight, other_labels, other_inputs = problem(300, 64, 1000, dtype=torch.bfloat16, seed=1)
    with torch.no_grad():
        h.copy_(other), w.copy_(other_weight), labels.copy_(other_labels), scale.fill_(3.0)
        for name, x in inputs.tensors().items():
            x.copy_(other_inputs.tensors()[name])
    graph.replay()
    truth, grads = dense(other, other_weight, other_labels, "idft", inputs=other_inputs)
    assert loss.item() == pytest.approx(truth.loss_sum.item(), rel=1e-2)
    assert distance(h.grad, 3 * grads["hidden"]) < 0.03 and distance(w.grad, 3 * grads["weight"]) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dw_is_summed_in_fp32(dtype):
    """40 chunks of one sign: the product is not rounded to half precision on its way into an fp32 sum."""
    dz, x = torch.rand(400, 300, device=CUDA).to(dtype), torch.rand(400, 64, device=CUDA).to(dtype)
    total = torch.zeros(300, 64, device=CUDA)
    for part in torch.arange(400, device=CUDA).chunk(40):
        accumulate_(total, dz[part], x[part])
    assert distance(total, dz.double().t() @ x.double()) <= tol.LINEAR_GRAD


def test_memory_with_main_grad():
    """Chunk of logits, dX and no [V, H] tensor: the statistics are small change."""
    T, H, V, chunk = 2048, 256, 32768, 256
    hidden, weight, labels, _ = _on_gpu(T, H, V)
    p, h = torch.nn.Parameter(weight), leaf(hidden, CUDA)
    p.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    plan = Plan(chunk_tokens=chunk, main_grad=MainGrad(p))
    for _ in range(2):
        h.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_token_loss(h, p, labels, "dft", plan=plan).loss_sum.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.1 * (chunk * V * 2 + T * H * 2) + 4 * 2**20, peak / 2**20
    assert p.grad is None or p.grad.is_sparse


def test_rows_on_the_gpu_are_refused():
    hidden, weight, labels, _ = _on_gpu()
    with pytest.raises(ValueError, match="plan.rows is on cuda:0: reading it would stall the queue"):
        linear_token_loss(hidden, weight, labels, "dft", plan=Plan(rows=torch.arange(300, device=CUDA)))


def test_tokens_outside_rows_count_as_masked():
    """On a GPU nobody looks whether rows leave out a live token."""
    hidden, weight, labels, inputs = _on_gpu()
    rows = torch.arange(10, 30)
    h, w = leaf(hidden, CUDA), leaf(weight, CUDA)
    out = linear_token_loss(h, w, labels, "dft", plan=Plan(rows=rows, chunk_tokens=8))
    out.loss_sum.backward()
    assert int(out.num_tokens) == 20 and not h.grad[:10].any() and not h.grad[30:].any()
    outside = torch.ones(300, dtype=torch.bool)
    outside[rows] = False
    truth, _ = dense(hidden.cpu(), weight.cpu(), labels.cpu().masked_fill(outside, MASKED), "dft", inputs=TokenInputs())
    assert out.loss_sum.item() == pytest.approx(truth.loss_sum.item(), rel=1e-2)
