"""The gradient of one optimiser step must not depend on how its sequences are spread over micro-batches and ranks.

Adam and gradient clipping hide a wrong normaliser, so the gradient itself is compared with the dense objective written out in fp64.
"""

import pytest
import torch

from megatron_plugin.data import cu_seqlens, pack_samples
from megatron_plugin.data.tokenize import Sample
from megatron_plugin.kernels.reference import token_stats_reference
from megatron_plugin.parallel.normaliser import (
    Source,
    SourceCount,
    StepCounts,
    StepMask,
    coefficients,
    count_step,
    divisor,
    sequence_tokens,
)  # fmt: skip
from tests import tolerances as tol
from tests.spawn import on_ranks

RANKS = "tests.parallel.normaliser_ranks"
H, V, S = 8, 50, 12  # hidden, vocabulary, positions per sequence
GRADIENT = dict(atol=tol.NORMALISER_GRAD, rtol=0)


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
        torch.testing.assert_close(value, objective, atol=0, rtol=tol.NORMALISER_LOSS)


def test_context_parallel_slices_count_a_sequence_once(step):
    """Two context-parallel ranks hold half of each sequence's positions, its length is that of the whole."""
    slices = [[{k: v[:, half].contiguous() for k, v in step.items()}] for half in (slice(0, S // 2), slice(S // 2, S))]
    weight, source = torch.randn(V, H) * 0.3, Source(denominator="sequence")
    truth, _ = _objective(step, weight, Source(), source, False)
    for gradient, _ in on_ranks(2, "tests.parallel.ranks", "step_gradient", micro_batches=slices, weight=weight, expert=Source(),
                                rollout=source, loss="sft", two_sources=False):
        torch.testing.assert_close(gradient.double(), truth, **GRADIENT)


def _packed(step):
    """The ten sequences in rows of two: [5, 2 S].  Their unused positions are padding of the segment (masked, but real)."""
    rows = {k: v.reshape(5, 2 * S, *v.shape[2:]) for k, v in step.items() if k in ("hidden", "labels", "mask")}
    return rows | {"segment_ids": torch.arange(2).repeat_interleave(S).expand(5, 2 * S).contiguous()}


# context-parallel ranks, and the rows of each micro-batch of each data-parallel rank
PACKED = {
    "one rank": (1, [[[0, 1, 2, 3, 4]]]),
    "CP2": (2, [[[0, 1, 2, 3, 4]]]),
    "CP2, two micro-batches": (2, [[[0, 1], [2, 3, 4]]]),
    "CP2, five micro-batches": (2, [[[0], [1], [2], [3], [4]]]),
    "CP4": (4, [[[0, 1, 2, 3, 4]]]),
    "CP2xDP2": (2, [[[0], [1, 4]], [[2, 3]]]),
}
MEANS = {
    "sequences": Source(denominator="sequence"),
    "constant": Source(denominator="constant", constant=S),
    "sequence sums": Source(denominator="constant", constant=1),
    "tokens": Source(),
}


def _rows(batch, layout):
    context, ranks = PACKED[layout]
    parts = [[{k: v[rows] for k, v in batch.items()} for rows in rank] for rank in ranks]
    return context * len(parts), dict(micro_batches=parts, context=context)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("layout", PACKED)
def test_packed_rows_over_context_parallel_ranks(step, layout, mean):
    """Zig-zag slices, uneven masks, a masked sequence: the same gradient as the dense objective in fp64."""
    weight = torch.randn(V, H) * 0.3
    truth, objective = _objective(step, weight, Source(), MEANS[mean], False)
    size, arguments = _rows(_packed(step), layout)
    for gradient, value, counts in on_ranks(size, RANKS, "packed_gradient", weight=weight, source=MEANS[mean], **arguments):
        torch.testing.assert_close(gradient.double(), truth, **GRADIENT)
        torch.testing.assert_close(value, objective, atol=0, rtol=tol.NORMALISER_LOSS)
        assert counts == StepCounts(SourceCount(0, 0), SourceCount(int(step["mask"].sum()), 9), 10 * S)


def test_a_sequence_cut_over_micro_batches(step):
    """Rows of half a sequence, the halves in different micro-batches of one rank: the whole sequence's length comes from sequence_ids."""
    halves = [{k: v[:, part].contiguous() for k, v in step.items() if k in ("hidden", "labels", "mask")} for part in (slice(0, 4), slice(4, S))]
    ids = [torch.arange(10)[:, None].expand_as(half["mask"]) for half in halves]
    together = [torch.cat([x.flatten() for x in xs]) for xs in ([half["mask"] for half in halves], ids)]
    lengths = sequence_tokens(together[0], sequence_ids=together[1]).split([half["mask"].numel() for half in halves])
    batches = [half | {"segment_ids": i, "lengths": n.view_as(i)} for half, i, n in zip(halves, ids, lengths, strict=True)]
    weight, source = torch.randn(V, H) * 0.3, Source(denominator="sequence")
    truth, _ = _objective(step, weight, Source(), source, False)
    for gradient, _, counts in on_ranks(2, RANKS, "packed_gradient", micro_batches=[batches], context=2, weight=weight, source=source):
        torch.testing.assert_close(gradient.double(), truth, **GRADIENT)
        assert counts.rollout.sequences == 9


@pytest.mark.parametrize("layout", PACKED)
def test_a_ratio_of_whole_sequences_over_context_parallel_ranks(step, layout):
    """context_gather gives a loss the whole rows and sums the gradient back: GSPO's sequence ratio needs no more."""
    weight, live = torch.randn(V, H) * 0.3, step["mask"].sum(1) > 0
    old, advantage = -3.9 + 0.3 * torch.randn(10, S), torch.randn(10)
    head = weight.double().requires_grad_()
    logp, _, _ = token_stats_reference(step["hidden"].double() @ head.T, step["labels"])
    means = ((logp - old) * step["mask"]).sum(1)[live] / step["lengths"][live, 0]
    objective = -(advantage[live] * means.exp()).mean()
    objective.backward()
    batch = _packed(step) | {"old": old.view(5, 2 * S), "advantage": advantage[:, None].expand(10, S).reshape(5, 2 * S)}
    size, arguments = _rows(batch, layout)
    for gradient, value in on_ranks(size, RANKS, "sequence_ratio_gradient", weight=weight, **arguments):
        torch.testing.assert_close(gradient.double(), head.grad, **GRADIENT)
        torch.testing.assert_close(value, objective.detach(), atol=0, rtol=tol.NORMALISER_LOSS)


def test_sequence_tokens_of_rows_segments_boundaries_and_ids():
    mask = torch.tensor([[1.0, 0, 2, 1, 0, 1], [0, 0, 0, 1, 1, 0]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, -1]])
    assert sequence_tokens(mask).tolist() == [[4] * 6, [2] * 6]
    assert sequence_tokens(mask, segment_ids=segments).tolist() == [[2, 2, 2, 2, 2, 2], [0, 0, 0, 2, 2, 0]]
    assert sequence_tokens(mask, cu_seqlens=torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)).tolist() == [[2] * 6, [0] * 3 + [2] * 3]
    assert sequence_tokens(mask, sequence_ids=segments).tolist() == [[2, 2, 2, 4, 4, 4], [2, 2, 2, 4, 4, 0]]  # 0 and 1 go on in the second row
    assert sequence_tokens(mask, segment_ids=segments).dtype == torch.int64


def test_sequence_tokens_agree_with_the_packer():
    """PackedBatch.segment_ids and data.cu_seqlens say the same."""
    samples = [Sample(torch.arange(n), torch.where(torch.arange(n) % 3 == 0, -100, torch.arange(n)), torch.ones(n), f"s:{n}") for n in (5, 7, 3, 9)]
    batch = pack_samples(samples, 12, pad_id=0).batch(range(2))
    live = batch.labels != -100
    by_segment = sequence_tokens(live, segment_ids=batch.segment_ids)
    assert torch.equal(by_segment, sequence_tokens(live, cu_seqlens=cu_seqlens(batch.segment_ids)))
    assert count_step([StepMask(live.float(), sequence_tokens=by_segment)]).rollout.sequences == 4


def test_lengths_that_count_something_else_are_refused():
    """Tokens masked after counting, a sequence of two sources, lengths of 0: the sum of 1 / length is no number of sequences."""
    mask, per_sequence = torch.ones(2, 4), Source(denominator="sequence")
    stale = StepMask(mask * torch.tensor([1, 1, 0, 1]), sequence_tokens=sequence_tokens(mask))
    mixed = StepMask(mask, torch.tensor([1, 0, 0, 0], dtype=torch.bool).expand(2, 4), sequence_tokens(mask))
    empty = StepMask(mask, sequence_tokens=torch.zeros(2, 4))
    for wrong, total in ((stale, "1.5"), (mixed, "1.5"), (empty, "inf")):
        counts = count_step([wrong])
        with pytest.raises(ValueError, match=f"add up to {total} sequences, expected a whole number"):
            coefficients(wrong, counts, rollout=per_sequence)
        assert coefficients(wrong, counts).isfinite().all()  # token means do not need them


def test_sequence_tokens_errors():
    mask = torch.ones(2, 3)
    with pytest.raises(ValueError, match="got segment_ids and cu_seqlens, expected one"):
        sequence_tokens(mask, segment_ids=mask.long(), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"got segment_ids of shape \[2, 2\], expected that of loss_mask, \[2, 3\]"):
        sequence_tokens(mask, segment_ids=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got 3 trained token\(s\) on padding"):
        sequence_tokens(mask, segment_ids=torch.tensor([[0, 0, 0], [-1, -1, -1]]))
    for boundaries in ([0, 3], [1, 6], [0, 4, 2, 6]):
        with pytest.raises(ValueError, match="expected ascending boundaries from 0 to the 6 tokens"):
            sequence_tokens(mask, cu_seqlens=torch.tensor(boundaries))


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
