"""One division per optimiser step, made right for one source of tokens or two (README.md in this folder has the truth table).

megatron-core, told `calculate_per_token_loss=True`, sums every rank's and micro-batch's (loss_sum, num_tokens) and divides once.
That is the token mean of one source.  Any other mean is reached through the per-token coefficients made here, before the step, from
the masks on the host; the loss and the kernels never see a denominator.

    objective  =  sum over sources of  share / Z_source * sum over its tokens of loss_t (/ tokens of the sequence, if per sequence)
    coefficient_t  =  share * N / Z_source (/ tokens of the sequence),        N = what megatron-core divides by
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.parallel.vocab import all_reduce_sum

DENOMINATORS = ("token", "sequence", "constant")


class StepMask(NamedTuple):
    """What the normaliser knows of one micro-batch, as this rank holds it (its context-parallel slice).  Host tensors of one shape."""

    loss_mask: Tensor
    """0 where a token is not trained; else its data weight (1 by default)."""
    expert: Tensor | None = None
    """bool, True for expert tokens; None when all come from one source, counted as rollouts."""
    sequence_tokens: Tensor | None = None
    """Trained tokens in the whole sequence each token belongs to, over all slices; needed by the 'sequence' and 'constant' denominators."""


class SourceCount(NamedTuple):
    """Size of one source in the whole step, over all ranks and micro-batches."""

    tokens: int
    sequences: int | None
    """None when sequence_tokens were not given."""


class StepCounts(NamedTuple):
    expert: SourceCount
    rollout: SourceCount


@dataclass(frozen=True, kw_only=True)
class Source:
    """How one source enters the objective."""

    share: float = 1.0
    """Weight of the source: mu for expert tokens and 1 - mu for rollouts in CHORD."""
    denominator: str = "token"
    """'token': mean over tokens (SFT, DAPO).  'sequence': mean over sequences of their token means (GRPO).
    'constant': sum over tokens / (constant x sequences) (Dr. GRPO)."""
    constant: float | None = None
    """Tokens per sequence under 'constant', usually the longest response allowed."""

    def __post_init__(self):
        if self.denominator not in DENOMINATORS:
            raise ValueError(f"denominator '{self.denominator}' is unknown; choose one of {', '.join(DENOMINATORS)}")
        if (self.denominator == "constant") != (self.constant is not None):
            raise ValueError(f"constant={self.constant} with denominator '{self.denominator}': give constant=<tokens> exactly with 'constant'")
        if self.constant is not None and not self.constant > 0:
            raise ValueError(f"constant={self.constant} is not a positive number of tokens")


def count_step(masks: Iterable[StepMask], group: dist.ProcessGroup | None = None) -> StepCounts:
    """Tokens and sequences of each source in the step, by one all-reduce of a few numbers over `group` (data x context parallel).

    Call it on every rank with all its micro-batches before the first forward: in a pipeline the first backward runs before the last
    micro-batch is seen.  A rank without live tokens still calls it.
    """
    local = torch.zeros(3, 2, dtype=torch.float64)  # rows: tokens, sequences, are sequences unknown; columns: expert, rollout
    for mask in masks:
        live, expert = _sources(mask)
        lengths = mask.sequence_tokens
        for column, tokens in enumerate((live & expert, live & ~expert)):
            local[0, column] += tokens.sum()
            if lengths is None:
                local[2, column] += tokens.any()
            else:  # a sequence of n tokens adds n times 1/n, however its tokens are spread over micro-batches and ranks
                local[1, column] += lengths[tokens].double().reciprocal().sum()
    tokens, sequences, unknown = all_reduce_sum(local, group).tolist()
    expert, rollout = (SourceCount(round(n), None if u else round(s)) for n, s, u in zip(tokens, sequences, unknown, strict=True))
    return StepCounts(expert, rollout)


def divisor(counts: StepCounts, *, expert: Source, rollout: Source) -> int:
    """What the ranks' num_tokens add up to: tokens of the sources that have a share in the objective."""
    return (counts.expert.tokens if expert.share else 0) + (counts.rollout.tokens if rollout.share else 0)


def coefficients(
    mask: StepMask, counts: StepCounts, *, expert: Source | None = None, rollout: Source | None = None, divided_by: int | None = None
) -> Tensor:
    """fp32 coefficients of one micro-batch, of loss_mask's shape, for TokenInputs.coefficient.

    divided_by: N, what megatron-core will divide the summed loss by; by default the loss tokens of the sources that take part, which
    is what token_loss counts.  With mixture-of-experts models pass the number of all non-padding tokens, and return that as
    num_tokens: the router's auxiliary loss is scaled by it.
    """
    expert, rollout = expert or Source(), rollout or Source()
    total = divisor(counts, expert=expert, rollout=rollout) if divided_by is None else divided_by
    live, is_expert = _sources(mask)
    out = torch.zeros(live.shape, dtype=torch.float64)
    for tokens, source, count in ((live & is_expert, expert, counts.expert), (live & ~is_expert, rollout, counts.rollout)):
        if source.share == 0 or count.tokens == 0:
            continue
        if source.denominator != "token" and count.sequences is None:
            raise ValueError(f"denominator '{source.denominator}' needs sequence_tokens in every StepMask of the step and one came without")
        match source.denominator:
            case "token":
                per_token = torch.ones_like(out) / count.tokens
            case "sequence":
                per_token = mask.sequence_tokens.double().reciprocal() / count.sequences
            case "constant":
                per_token = torch.ones_like(out) / (source.constant * count.sequences)
        out = torch.where(tokens, source.share * total * per_token, out)
    return torch.where(live, out * mask.loss_mask, 0.0).float()


def _sources(mask: StepMask) -> tuple[Tensor, Tensor]:
    """(live, is expert), both bool; ValueError for shapes that do not fit or tensors that would need a wait for the GPU."""
    for name, x in zip(mask._fields, mask, strict=True):
        if x is not None and (x.device.type != "cpu" or x.shape != mask.loss_mask.shape):
            raise ValueError(
                f"StepMask.{name} is {list(x.shape)} on {x.device}; expected {list(mask.loss_mask.shape)} on the host (the data loader's copy)"
            )
    live = mask.loss_mask != 0
    return live, torch.zeros_like(live) if mask.expert is None else mask.expert.bool()
