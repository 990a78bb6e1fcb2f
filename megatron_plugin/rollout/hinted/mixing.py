"""The mix of two next-token distributions: m(x) proportional to p(x)^(1-lambda) q(x)^lambda, lambda from the entropy of p (arXiv 2602.12222).

p: hinted stream.  q: plain stream.  N pairs, V columns of the logits, of which the first `vocab_size` are real.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from megatron_plugin.rollout.hinted.options import HintedOptions

__all__ = ["Phase", "keep_nucleus", "mix", "share_of_plain"]

HEAD = 512  # columns; 32 rows of 151 936 on one CPU thread: 5 ms, sorted whole 13 ms
LEAST = -1e4  # nats; a probability is 0 long before, in fp64 too


class Phase(Enum):
    """Where an answer is."""

    FIRST = "first"
    """Nothing drawn yet: p alone, unless first_from_hint is off."""
    MIXED = "mixed"
    PLAIN = "plain"
    """After the splitter: q alone."""


def mix(hinted_NV: Tensor, plain_NV: Tensor, phases_N: Sequence[Phase], options: HintedOptions) -> Tensor:
    """log m, [N, V] fp32 (fp64 for fp64), of logits of any floating dtype: over the nucleus only, before the temperature.

    Columns outside of the nucleus, and from vocab_size on, are -inf; the others are not normalised again (a softmax does it).  ValueError when the
    streams' shapes differ, or the logits have fewer than vocab_size columns."""
    if hinted_NV.shape != plain_NV.shape or hinted_NV.shape[-1] < options.vocab_size:
        raise ValueError(
            f"got logits of {tuple(hinted_NV.shape)} (hinted) and {tuple(plain_NV.shape)} (plain), expected two alike of at least "
            f"{options.vocab_size} columns: do both streams have the model and tokenizer that vocab_size is of?"
        )
    logp_NV, logq_NV = (_log_softmax(logits_NV, options.vocab_size) for logits_NV in (hinted_NV, plain_NV))
    share_N1 = share_of_plain(logp_NV, options)
    for row, phase in enumerate(phases_N):
        if phase is Phase.PLAIN:
            share_N1[row] = 1.0
        elif phase is Phase.FIRST and options.first_from_hint:
            share_N1[row] = 0.0
    logm_NV = (1 - share_N1) * logp_NV + share_N1 * logq_NV
    for share, alone_NV in ((0.0, logp_NV), (1.0, logq_NV)):  # 0 * -inf is nan: a stream with no say must not veto by its impossible tokens
        rows = (share_N1 == share).squeeze(-1).nonzero().squeeze(-1)
        logm_NV[rows] = alone_NV[rows]
    logm_NV = keep_nucleus(logm_NV.log_softmax(-1), options.top_p)
    return torch.nn.functional.pad(logm_NV, (0, hinted_NV.shape[-1] - options.vocab_size), value=-math.inf)


def share_of_plain(logp_NV: Tensor, options: HintedOptions) -> Tensor:
    """lambda, [N, 1] in [0, 1], of the hinted stream's normalised log-probabilities: a sure hint is followed, an unsure one gives way."""
    entropy_N1 = -(logp_NV.exp() * logp_NV.clamp(min=LEAST)).sum(-1, keepdim=True)  # 0 * -inf is nan
    relative_N1 = entropy_N1 / math.log(options.vocab_size)
    if options.schedule == "linear":
        share_N1 = options.beta * relative_N1
    elif options.schedule == "sigmoid":
        share_N1 = torch.sigmoid(options.beta * (relative_N1 - options.center))
    else:
        low, high = options.bounds
        share_N1 = (relative_N1 - low) / (high - low)
    return share_N1.clamp(0.0, 1.0)


def keep_nucleus(logm_NV: Tensor, top_p: float) -> Tensor:
    """-inf for all but the fewest most probable tokens that have top_p together, and those as probable as the last of them.

    Of normalised log-probabilities.  Found among the best HEAD columns, where it nearly always is; only rows where it is larger are sorted."""
    if top_p >= 1.0:
        return logm_NV
    last_N1 = _last_of_nucleus(_best(logm_NV, min(HEAD, logm_NV.shape[-1])), top_p)
    wide = (last_N1 == -math.inf).squeeze(-1).nonzero().squeeze(-1)
    if len(wide):
        last_N1[wide] = _last_of_nucleus(_best(logm_NV[wide], logm_NV.shape[-1]), top_p)
    return logm_NV.masked_fill(logm_NV < last_N1, -math.inf)


def _best(logm_NV: Tensor, count: int) -> Tensor:
    """[N, count]: the largest of each row, largest first."""
    if logm_NV.device.type != "cpu":
        return logm_NV.topk(count, dim=-1).values
    best_NK = logm_NV.numpy()  # which has vector instructions for it: 512 of 4096 in 32 rows take 0.16 ms, by topk 1.7 ms
    if count < best_NK.shape[-1]:
        best_NK = np.partition(best_NK, -count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(best_NK, axis=-1)[:, ::-1].copy())


def _last_of_nucleus(best_NK: Tensor, top_p: float) -> Tensor:
    """[N, 1]: the log-probability with which the sum of the sorted ones reaches top_p; -inf where it does not."""
    short_N1 = (best_NK.exp().cumsum(-1) < top_p).sum(-1, keepdim=True)
    beyond = best_NK.new_full((len(best_NK), 1), -math.inf)
    return torch.cat([best_NK, beyond], -1).gather(-1, short_N1)


def _log_softmax(logits_NV: Tensor, vocab_size: int) -> Tensor:
    return logits_NV[..., :vocab_size].to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(-1)
