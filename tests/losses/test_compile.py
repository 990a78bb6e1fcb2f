"""Losses and their reduction are plain tensor code: one graph, no break."""

import pytest
import torch

from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.reduction import evaluate_loss
from tests.losses.oracle import dense_stats
from tests.losses.policy_oracle import all_own, policy_tokens


# those with most branches and checks; each costs a second
@pytest.mark.parametrize("name, params", [("idft", {}), ("grpo", {}), ("chord", {"kl": 0.1, "tis": 2.0}), ("srft", {}), ("gspo", {})])
def test_one_graph(name, params):
    logits_TV, labels_T, inputs = policy_tokens(T=8)
    stats, live, loss = dense_stats(logits_TV.detach(), labels_T), torch.arange(8) > 2, bind(name, z_loss=0.1, **params)
    inputs = inputs if name in ("chord", "srft") else all_own(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda stats, inputs, live: evaluate_loss(loss, stats, inputs, live).loss_sum, fullgraph=True, backend="eager")
    assert torch.equal(compiled(stats, inputs, live), evaluate_loss(loss, stats, inputs, live).loss_sum)
    torch._dynamo.reset()
