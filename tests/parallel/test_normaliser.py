"""The gradient of one optimiser step must not depend on how its sequences are spread over micro-batches and ranks.

Adam and gradient clipping hide a wrong normaliser, so the gradient itself is compared with the dense objective written out in fp64.
"""

import pytest
import torch

from megatron_plugin.kernels.reference import token_stats_reference
from megatron_plugin.parallel.normaliser import Source, SourceCount, StepCounts, StepMask, coefficients, count_step, divisor
from tests.spawn import on_ranks

H, V, S = 8, 50, 12  # hidden, vocabulary, positions per sequence
GRADIENT = dict(atol=3e-7, rtol=3e-6)  # measured 1.2e-7 of a gradient of size 0.3


@pytest.fixture
def step():
    """Ten sequences of unequal masks: one fully masked, one with a single token; the last four are expert demonstrations."""
    lengths = torch.tensor([12, 5, 0, 1, 7, 12, 3, 9, 2, 11])
    mask = (torch.arange(S) < lengths[:, None]).float()
    return dict(hidden=torch.randn(10, S, H), labels=torch.randint(0, V, (10, S)), mask=mask,
                expert=(torch.arange(10) >= 6)[:, None].expand(10, S).contiguous(), lengths=lengths[:, None].expand(10, S).contiguous())


# sequences of each micro-batch of each rank; every layout holds the same ten
LAYOUTS = {
    "one rank, one micro-batch": [[range(10)]],
    "one rank, ten micro-batches": [[[i] for i in range(10)]],
    "one rank, uneven, all-masked micro-batch": [[[2], [0, 1, 3, 4, 5, 6], [7, 8, 9]]],
    "two ranks": [[[0, 2], [4, 6, 8]], [[1, 3], [5, 7, 9]]],
    "two ranks, sources apart": [[[6, 7], [8, 9]], [[0, 1, 2], [3, 4, 5]]],
    "three ranks, one fully masked": [[[0, 1], [3, 4, 5]], [[2]], [[6, 7], [8, 9]]],
    "four ranks": [[[0]], [[9], [8], [7]], [[1, 2, 3]], [[4, 5, 6]]],
}


def _split(step, layout):
    return [[{k: v[list(rows)] for k, v in step.items()} for rows in rank] for rank in layout]


def _objective(step, weight, expert: Source, rollout: Source, two_sources: bool):
    """The mean written out: sum over sources of share / Z * sum of -logp, in fp64."""
    head = weight.double().requires_grad_()
    logp, _, _ = token_stats_reference(step["hidden"].double() @ head.T, step["labels"])
    is_expert = step["expert"] if two_sources else torch.zeros_like(step["expert"])
    total = 0.0
    for source, chosen in ((expert, is_expert), (rollout, ~is_expert)):
        mask = step["mask"].double() * chosen
        if not source.share or not mask.any():
            continue
        lengths = step["lengths"][:, 0].double()
        live = (mask.sum(1) > 0)
        match source.denominator:
            case "token":
                mean = (-logp * mask).sum() / mask.sum()
            case "sequence":
                mean = ((-logp * mask).sum(1)[live] / lengths[live]).mean()
            case "constant":
                mean = (-logp * mask).sum() / (source.constant * live.sum())
        total = total + source.share * mean
    total.backward()
    return head.grad, total.detach()


SOURCES = {
    "one source, tokens": (Source(), Source(), False),
    "one source, sequences": (Source(), Source(denominator="sequence"), False),
    "one source, constant": (Source(), Source(denominator="constant", constant=S), False),
    "CHORD, mu 0.3": (Source(share=0.3), Source(share=0.7), True),
    "CHORD, GRPO per sequence": (Source(share=0.3), Source(share=0.7, denominator="sequence"), True),
    "CHORD, Dr. GRPO": (Source(share=0.3), Source(share=0.7, denominator="constant", constant=S), True),
    "mu 0": (Source(share=0.0), Source(share=1.0), True),
    "mu 1": (Source(share=1.0), Source(share=0.0), True),
}


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_the_same_under_every_split(step, layout, sources):
    expert, rollout, two_sources = SOURCES[sources]
    weight = torch.randn(V, H) * 0.3
    truth, objective = _objective(step, weight, expert, rollout, two_sources)
    parts = _split(step, LAYOUTS[layout])
    results = on_ranks(len(parts), "tests.parallel.ranks", "step_gradient", micro_batches=parts, weight=weight, expert=expert,
                       rollout=rollout, loss="sft", two_sources=two_sources)
    for gradient, value in results:
        torch.testing.assert_close(gradient.double(), truth, **GRADIENT)
        torch.testing.assert_close(value, objective, atol=0, rtol=1e-6)


def test_context_parallel_slices_count_a_sequence_once(step):
    """Two context-parallel ranks hold half of each sequence's positions, its length is that of the whole."""
    slices = [[{k: v[:, half].contiguous() for k, v in step.items()}] for half in (slice(0, S // 2), slice(S // 2, S))]
    weight, source = torch.randn(V, H) * 0.3, Source(denominator="sequence")
    truth, _ = _objective(step, weight, Source(), source, False)
    for gradient, _ in on_ranks(2, "tests.parallel.ranks", "step_gradient", micro_batches=slices, weight=weight, expert=Source(),
                                rollout=source, loss="sft", two_sources=False):
        torch.testing.assert_close(gradient.double(), truth, **GRADIENT)


def test_data_weights_scale_tokens_and_do_not_count():
    """The denominator counts tokens, never the sum of weights: a weight of 2 doubles a token."""
    mask = StepMask(torch.tensor([2.0, 1.0, 0.0, 1.0]))
    assert coefficients(mask, count_step([mask])).tolist() == [2.0, 1.0, 0.0, 1.0]


def test_divisor_counts_what_token_loss_counts():
    """With mu = 0 expert tokens are masked, so megatron-core's sum of num_tokens holds none of them."""
    counts = StepCounts(SourceCount(30, 3), SourceCount(70, 7))
    assert divisor(counts, expert=Source(share=0.2), rollout=Source(share=0.8)) == 100
    assert divisor(counts, expert=Source(share=0.0), rollout=Source(share=1.0)) == 70


def test_a_chosen_divisor_leaves_the_objective_alone():
    """Mixture-of-experts models divide by all non-padding tokens."""
    mask = StepMask(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    counts = count_step([mask])
    assert torch.equal(coefficients(mask, counts, divided_by=4) / 4, coefficients(mask, counts) / 3)


def test_a_source_without_tokens_is_left_out():
    mask = StepMask(torch.ones(4), torch.zeros(4, dtype=torch.bool))
    assert coefficients(mask, count_step([mask]), expert=Source(share=0.5), rollout=Source(share=0.5)).tolist() == [0.5] * 4


def test_clear_errors():
    with pytest.raises(ValueError, match="denominator 'mean' is unknown; choose one of token, sequence, constant"):
        Source(denominator="mean")
    with pytest.raises(ValueError, match="constant=None with denominator 'constant'"):
        Source(denominator="constant")
    with pytest.raises(ValueError, match="not a positive number"):
        Source(denominator="constant", constant=0.0)
    mask = StepMask(torch.ones(3))
    with pytest.raises(ValueError, match="needs sequence_tokens"):
        coefficients(mask, count_step([mask]), rollout=Source(denominator="sequence"))
    with pytest.raises(ValueError, match=r"StepMask.expert is \[2\] on cpu; expected \[3\] on the host"):
        count_step([StepMask(torch.ones(3), torch.ones(2, dtype=torch.bool))])
