"""What only a GPU can show: graph capture, no waiting for the host, memory, more than 2^31 logits."""

import pytest
import torch

from megatron_plugin import TokenInputs, bind, token_loss, token_stats

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _batch(T: int, V: int):
    return torch.randn(T, V, device="cuda", dtype=torch.bfloat16), torch.randint(0, V, (T,), device="cuda")


def test_a_graph_replays_with_new_logits_and_a_new_parameter():
    """mu changes each step: as a 0-d tensor it is read by the replayed kernel."""
    logits, labels = _batch(64, 5003)
    ramp, buffer = torch.tensor(0.2, device="cuda"), logits.clone()
    loss = bind("idft", ramp=ramp)

    def step():
        z = buffer.detach().requires_grad_()
        out = token_loss(z, labels, loss)
        (grad,) = torch.autograd.grad(out.loss_sum, z)
        return out.loss_sum, grad

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (0.7, 1.0):
        new = torch.randn_like(logits)
        buffer.copy_(new)
        ramp.fill_(value)
        graph.replay()
        z = new.clone().requires_grad_()
        out = token_loss(z, labels, bind("idft", ramp=value))
        (grad,) = torch.autograd.grad(out.loss_sum, z)
        assert torch.equal(captured[0], out.loss_sum) and torch.equal(captured[1], grad)


@pytest.mark.parametrize("loss", ["dft", "grpo"])
def test_nothing_waits_for_the_gpu(loss):
    logits, labels = _batch(64, 5003)
    inputs = TokenInputs(coefficient=torch.rand(64, device="cuda"), advantage=torch.randn(64, device="cuda"))
    z = logits.requires_grad_()
    token_loss(z, labels, loss, inputs=inputs).loss_sum.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_loss(z, labels, loss, inputs=inputs).loss_sum.backward()
        stats = token_stats(z, labels)
        (stats.logp + stats.entropy).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_overwriting_needs_no_second_copy_of_the_logits():
    logits, labels = _batch(2048, 32768)
    z = logits.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(token_loss(z, labels, "dft", overwrite_logits=True).loss_sum, z)
    assert torch.cuda.max_memory_allocated() - before < 2**20


def test_more_than_two_to_the_31_logits():
    T, V = 9000, 262144  # 4.7 GB of bf16
    logits, labels = _batch(T, V)
    last = logits[-3:].clone().requires_grad_()
    z = logits.requires_grad_()
    (grad,) = torch.autograd.grad(token_loss(z, labels, "chord_phi", overwrite_logits=True).loss_sum, z)
    (expected,) = torch.autograd.grad(token_loss(last, labels[-3:], "chord_phi").loss_sum, last)
    assert torch.equal(grad[-3:], expected)
