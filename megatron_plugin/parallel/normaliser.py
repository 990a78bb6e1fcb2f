"""One division per optimiser step, made right for one source of tokens or two (README.md in this folder has the truth table).

megatron-core, told `calculate_per_token_loss=True`, sums every rank's and micro-batch's (loss_sum, num_tokens) and divides once.
That is the token mean of one source.  Any other mean is reached through the per-token coefficients made here, before the step, from
the masks on the host; the loss and the kernels never see a denominator.

    objective  =  sum over sources of  share / Z_source * sum over its tokens of loss_t (/ tokens of the sequence, if per sequence)
    coefficient_t  =  share * N / Z_source (/ tokens of the sequence),        N = what megatron-core divides by
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.parallel.vocab import all_reduce_sum

DENOMINATORS = ("token", "sequence", "constant")
Count = TypeVar("Count", int, Tensor)


class StepMask(NamedTuple):
    """What the normaliser knows of one micro-batch, as this rank holds it (its context-parallel slice).  Host tensors of one shape."""

    loss_mask: Tensor
    """0 where a token is not trained; else its data weight (1 by default)."""
    expert: Tensor | None = None
    """bool, True for expert tokens; None when all come from one source, counted as rollouts."""
    sequence_tokens: Tensor | None = None
    """Trained tokens in the whole sequence each token belongs to, over all slices; needed by the 'sequence' and 'constant' denominators.
    `sequence_tokens` makes it, before anything is sliced."""
    real: Tensor | None = None
    """bool, False on padding; only needed for N of a model with mixture of experts (`tokens_to_divide_by`)."""


class SourceCount(NamedTuple):
    """Size of one source in the whole step, over all ranks and micro-batches."""

    tokens: int
    sequences: float | None
    """Sequences with a trained token; None when sequence_tokens were not given, not a whole number when they count something else."""


class StepCounts(NamedTuple):
    expert: SourceCount
    rollout: SourceCount
    real_tokens: int | None = None
    """All tokens but padding, masked ones too; None when `real` was not given."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """How one source enters the objective."""

    share: float = 1.0
    """Weight of the source: mu for expert tokens and 1 - mu for rollouts in CHORD."""
    denominator: str = "token"
    """'token': mean over tokens (SFT, DAPO).  'sequence': mean over sequences of their token means (GRPO).
    'constant': sum over tokens / (constant x sequences) (Dr. GRPO; with constant=1 the mean over sequences of their sums).
    Sequences without a trained token are not counted."""
    constant: float | None = None
    """Tokens per sequence under 'constant', usually the longest response allowed."""

    def __post_init__(self):
        if self.denominator not in DENOMINATORS:
            raise ValueError(f"denominator '{self.denominator}' is unknown; choose one of {', '.join(DENOMINATORS)}")
        if (self.denominator == "constant") != (self.constant is not None):
            raise ValueError(
                f"constant={self.constant} with denominator '{self.denominator}': give constant=<tokens> exactly with 'constant'"
            )
        if self.constant is not None and not self.constant > 0:
            raise ValueError(f"constant={self.constant} is not a positive number of tokens")


def count_step(masks: Iterable[StepMask], group: dist.ProcessGroup | None = None) -> StepCounts:
    """Tokens and sequences of each source in the step, by one all-reduce of a few numbers over `group` (data x context parallel).

    Call it on every rank with all its micro-batches before the first forward: in a pipeline the first backward runs before the last
    micro-batch is seen.  A rank without live tokens still calls it.
    """
    # columns: expert, rollout; rows: tokens, sequences, are the sequences unknown.  The last row: real tokens, are they unknown.
    totals = torch.zeros(4, 2, dtype=torch.float64)
    for mask in masks:
        live, expert = _sources(mask)
        lengths = mask.sequence_tokens
        for column, tokens in enumerate((live & expert, live & ~expert)):
            totals[0, column] += tokens.sum()
            if lengths is None:
                totals[2, column] += tokens.any()
            else:  # a sequence of n tokens adds n times 1/n, however its tokens are spread over micro-batches and ranks
                totals[1, column] += lengths[tokens].double().reciprocal().sum()
        totals[3] += torch.tensor([0, 1] if mask.real is None else [int(mask.real.sum()), 0])
    tokens, sequences, unknown, (real, real_unknown) = all_reduce_sum(totals, group).tolist()
    whole = [round(s) if math.isfinite(s) and abs(s - round(s)) < 1e-6 else s for s in sequences]
    experts, rollouts = (SourceCount(round(n), None if u else s) for n, s, u in zip(tokens, whole, unknown, strict=True))
    return StepCounts(experts, rollouts, None if real_unknown else round(real))


def sequence_tokens(
    loss_mask: Tensor, *, segment_ids: Tensor | None = None, sequence_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Trained tokens (loss_mask not 0) of the whole sequence that each token belongs to, for StepMask: int64 of loss_mask's shape, 0 on padding.

    Host tensors, before context-parallel slicing; then slice the result like the mask.  Where the sequences are, by one of
      nothing       every row (the last dimension) is one sequence
      segment_ids   packed rows, PackedBatch.segment_ids: loss_mask's shape, numbers that start anew in each row, negative on padding
      cu_seqlens    packed rows laid end to end: [sequences + 1] boundaries of the flattened tokens, from 0 to their number
      sequence_ids  sequences cut over several rows or micro-batches (stack those first): loss_mask's shape, the same number wherever it is
                    the same sequence, negative on padding
    ValueError for shapes that do not fit, for several of them, and for a trained token on padding."""
    given = {"segment_ids": segment_ids, "sequence_ids": sequence_ids, "cu_seqlens": cu_seqlens}
    given = {name: x for name, x in given.items() if x is not None}
    if len(given) > 1:
        raise ValueError(f"got {' and '.join(given)}, expected one of them: each says by itself where the sequences are")
    if cu_seqlens is not None:
        ids = _ids_of(cu_seqlens, loss_mask)
    elif sequence_ids is not None:
        ids = sequence_ids
    else:
        ids = torch.zeros_like(loss_mask, dtype=torch.int64) if segment_ids is None else segment_ids
        rows = torch.arange(ids[..., 0].numel()).view(*ids.shape[:-1], 1)
        ids = torch.where(ids < 0, -1, rows * (ids.max() + 1) + ids) if ids.numel() else ids
    if ids.shape != loss_mask.shape:
        raise ValueError(f"got {next(iter(given))} of shape {list(ids.shape)}, expected that of loss_mask, {list(loss_mask.shape)}")
    live = loss_mask != 0
    if (live & (ids < 0)).any():
        raise ValueError(
            f"got {int((live & (ids < 0)).sum())} trained token(s) on padding, expected loss_mask 0 where {next(iter(given))} is negative"
        )
    _, place = ids.unique(return_inverse=True)
    counts = torch.zeros(place.numel(), dtype=torch.int64).index_add(0, place.flatten(), live.long().flatten())
    return torch.where(ids < 0, 0, counts[place])


def _ids_of(cu_seqlens: Tensor, loss_mask: Tensor) -> Tensor:
    lengths = cu_seqlens.diff()
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != loss_mask.numel() or (lengths < 0).any():
        raise ValueError(
            f"got cu_seqlens {cu_seqlens.tolist()}, expected ascending boundaries from 0 to the {loss_mask.numel()} tokens of loss_mask"
        )
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths.long()).view_as(loss_mask)


def tokens_to_divide_by(config, *, loss_tokens: Count, real_tokens: Count | None) -> Count:
    """N: the loss tokens, but all tokens that are not padding where the model has mixture of experts with an auxiliary or z loss.

    For the num_tokens that loss_func returns (of a micro-batch, tensors), and for `coefficients(divided_by=)` (of the step, from
    `count_step`): both or neither.  `config`: anything with megatron-core's num_moe_experts, moe_aux_loss_coeff and moe_z_loss_coeff.

    With calculate_per_token_loss, megatron-core's router multiplies its losses by the tokens it routes (megatron/core/transformer/moe/router.py,
    attach_and_log_load_balancing_loss) and trusts that the step divides by as many; loss tokens alone make them (tokens / loss tokens) times
    too large.  The router leaves padding out if the model is given padding_mask (0.16 and later; True is padding); otherwise it routes padding
    too, and real_tokens is all of b x s.  MTP's loss is a sum over loss tokens and right with N = loss tokens; under mixture of experts it is
    (loss tokens / tokens) times too small, which mtp_loss_scaling_factor can take back.  ValueError when real_tokens is needed and None."""
    coefficients = getattr(config, "moe_aux_loss_coeff", None), getattr(config, "moe_z_loss_coeff", None)
    weighted = any(c for each in coefficients for c in (each if isinstance(each, list | tuple) else (each,)))
    if not (getattr(config, "num_moe_experts", None) and weighted):
        return loss_tokens
    if real_tokens is None:
        raise ValueError(
            "got real_tokens=None for a model with mixture of experts, expected the count of all tokens but padding: set StepMask.real"
        )
    return real_tokens


def divisor(counts: StepCounts, *, expert: Source, rollout: Source) -> int:
    """What the ranks' num_tokens add up to: tokens of the sources that have a share in the objective."""
    return (counts.expert.tokens if expert.share else 0) + (counts.rollout.tokens if rollout.share else 0)


def coefficients(
    mask: StepMask, counts: StepCounts, *, expert: Source | None = None, rollout: Source | None = None, divided_by: int | None = None
) -> Tensor:
    """fp32 coefficients of one micro-batch, of loss_mask's shape, for TokenInputs.coefficient.

    divided_by: N, what megatron-core will divide the summed loss by; by default the loss tokens of the sources that take part, which
    is what token_loss counts.  `tokens_to_divide_by` says when it has to be another number.
    """
    expert, rollout = expert or Source(), rollout or Source()
    total = divisor(counts, expert=expert, rollout=rollout) if divided_by is None else divided_by
    live, is_expert = _sources(mask)
    out = torch.zeros(live.shape, dtype=torch.float64)
    for tokens, source, count in ((live & is_expert, expert, counts.expert), (live & ~is_expert, rollout, counts.rollout)):
        if source.share == 0 or count.tokens == 0:
            continue
        if source.denominator == "token":
            per_token = torch.ones_like(out) / count.tokens
        else:
            per_token = _per_sequence(source, mask.sequence_tokens, count.sequences)
        out = torch.where(tokens, source.share * total * per_token, out)
    return torch.where(live, out * mask.loss_mask, 0.0).float()


def _per_sequence(source: Source, sequence_tokens: Tensor | None, sequences: float | None) -> Tensor:
    """fp64, of loss_mask's shape: what a token weighs in a mean over `sequences` sequences."""
    if sequences is None or sequence_tokens is None:
        raise ValueError(f"denominator '{source.denominator}' needs sequence_tokens in every StepMask of the step and one came without")
    if not isinstance(sequences, int):
        raise ValueError(
            f"got sequence_tokens that add up to {sequences:.6g} sequences, expected a whole number: they count the tokens of one "
            "source that loss_mask leaves, in whole sequences; call sequence_tokens() on the final loss_mask, before slicing"
        )
    if source.constant is not None:
        return torch.ones_like(sequence_tokens, dtype=torch.float64) / (source.constant * sequences)
    return sequence_tokens.double().reciprocal() / sequences


def _sources(mask: StepMask) -> tuple[Tensor, Tensor]:
    """(live, is expert), both bool; ValueError for shapes that do not fit or tensors that would need a wait for the GPU."""
    for name, x in zip(mask._fields, mask, strict=True):
        if x is not None and (x.device.type != "cpu" or x.shape != mask.loss_mask.shape):
            raise ValueError(
                f"StepMask.{name} is {list(x.shape)} on {x.device}; expected {list(mask.loss_mask.shape)} on the host (the data loader's copy)"
            )
    live = mask.loss_mask != 0
    return live, torch.zeros_like(live) if mask.expert is None else mask.expert.bool()
