"""CLL as a statistic: counts of surprising tokens from one number per token, and the same through every way in."""

import torch

from megatron_plugin import TokenInputs, bind, token_loss
from megatron_plugin.hooks.report import metric_pairs
from megatron_plugin.losses.cll import CLL_METRICS, cll_counts
from megatron_plugin.losses.probe import metric_names


def test_counts_are_strict_and_leave_masked_and_nan_tokens_out():
    cll = torch.tensor([0.5, 0.0, -1.0, -1.5, -3.0, -3.5, -5.0, -5.5, float("nan"), float("-inf")])
    logp, entropy = cll - 0.25, torch.full_like(cll, 0.25)
    logp[1] = entropy[1] = 0.0  # a masked token
    got = {name: int(count) for name, count in cll_counts(logp, entropy).items()}
    assert got == {"cll_above_0": 1, "cll_below_minus_1": 6, "cll_below_minus_3": 4, "cll_below_minus_5": 2}
    assert tuple(got) == CLL_METRICS


def test_a_step_reports_them_with_every_loss():
    """Beside the sums of the op, from its per-token values: masked tokens, whose logits say anything, are not counted."""
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(64, 11), torch.randint(0, 11, (64,))
    live = torch.arange(64) % 3 > 0
    logits[~live] = float("nan")
    logp = torch.where(live[:, None], logits, 0.0).double().log_softmax(-1)
    cll = logp.gather(-1, labels[:, None])[:, 0] - (logp.exp() * logp).sum(-1)
    expected = [(cll > 0), (cll < -1), (cll < -3), (cll < -5)]
    expected = [int((which & live).sum()) for which in expected]
    assert all(expected) and len(set(expected)) == 4, "choose another seed"
    for name in ("dft", "idft"):
        pairs = metric_pairs(token_loss(logits, labels, name, inputs=TokenInputs(coefficient=live.float())))
        assert [pairs[metric].tolist() for metric in CLL_METRICS] == [[count, int(live.sum())] for count in expected]
        assert set(metric_names(bind(name))) <= {"lm loss", *pairs}
