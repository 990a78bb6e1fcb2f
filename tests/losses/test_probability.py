"""The histogram of token probabilities that a step reports."""

import torch

from megatron_plugin import TokenInputs, bind, token_loss
from megatron_plugin.hooks.report import metric_pairs
from megatron_plugin.losses.probability import PROBABILITY_METRICS, probability_counts
from megatron_plugin.losses.probe import metric_names


def test_counts_are_cumulative_and_leave_out_masked_tokens_and_nan():
    p = torch.tensor([0.05, 0.15, 0.15, 0.55, 0.95, 1.0, float("nan")])
    logp = p.log()
    logp[5] = 0.0  # masked
    assert [int(count) for count in probability_counts(logp).values()] == [1, 3, 3, 3, 3, 4, 4, 4, 4]


def test_a_step_reports_them_with_every_loss():
    """Against probabilities formed in fp64; masked tokens, whose logits say anything, are not counted."""
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(512, 11), torch.randint(0, 11, (512,))
    live = torch.arange(512) % 3 > 0
    p = logits.double().softmax(-1).gather(-1, labels[:, None])[:, 0]
    expected = [int(((p < percent / 100) & live).sum()) for percent in range(10, 100, 10)]
    assert expected == sorted(set(expected)), "choose another seed: no two may be equal"
    logits[~live] = float("nan")
    for name in ("sft", "dft"):
        pairs = metric_pairs(token_loss(logits, labels, name, inputs=TokenInputs(coefficient=live.float())))
        assert [pairs[metric].tolist() for metric in PROBABILITY_METRICS] == [[count, int(live.sum())] for count in expected]
        assert set(metric_names(bind(name))) <= {"lm loss", *pairs}
