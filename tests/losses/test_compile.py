"""Losses and their reduction are plain tensor code: one graph, no break."""

import pytest
import torch

from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.reduction import evaluate_loss
from tests.losses.oracle import dense_stats, random_tokens


@pytest.mark.parametrize("name", ["idft", "grpo"])  # the two with most branches and checks; each costs a second
def test_one_graph(name):
    logits_TV, labels_T, inputs = random_tokens(T=8)
    stats, live, loss = dense_stats(logits_TV.detach(), labels_T), torch.arange(8) > 2, bind(name, z_loss=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda stats, inputs, live: evaluate_loss(loss, stats, inputs, live).loss_sum, fullgraph=True, backend="eager")
    assert torch.equal(compiled(stats, inputs, live), evaluate_loss(loss, stats, inputs, live).loss_sum)
    torch._dynamo.reset()
