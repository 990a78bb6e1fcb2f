"""From per-shard partial sums to the statistics of the whole row.  Tiny: a few numbers per token, so it is done in fp64.

T tokens, R shards (tensor-parallel ranks).  A shard's partials are (m2, s, t, z_y):
    m2   the base-2 reference actually subtracted,   s = sum 2^(z scale2 - m2),   t = sum (z - reference) e^(z - reference), nats,
    z_y  the label's raw logit, -inf where the shard does not hold the label.
"""

import math

import torch
from torch import Tensor

from megatron_plugin.kernels.layout import Shard

LN2 = math.log(2.0)
FAR = {torch.float32: 2.0**31, torch.float64: 2.0**60}  # |m2| from which a row is NaN, by working dtype: as in row.py


def merge_partials(partials_RT4: Tensor) -> Tensor:
    """[R, T, 4] partials of all shards -> [T, 4] fp64 of the whole row, summed in shard order: every rank gets the same bits."""
    m2_RT, s_RT, t_RT, z_RT = partials_RT4.double().unbind(-1)
    m2_T = m2_RT.amax(0)
    shift_RT = (m2_RT - m2_T).clamp(min=-1e4)
    rescale_RT = torch.exp2(shift_RT)
    s_T = (s_RT * rescale_RT).sum(0)
    t_T = ((t_RT + shift_RT * LN2 * s_RT) * rescale_RT).sum(0)
    return torch.stack((m2_T, s_T, t_T, z_RT.amax(0)), -1)


def finish_rows(partials_T4: Tensor, labels_T: Tensor, shard: Shard, work: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merged partials -> (logp, entropy, lse) [T] and the rows [T, 4] = (m2, s, logp, entropy) the gradient needs.  All fp64.

    `work` is the dtype the kernels worked in: z_y must be scaled by the factor they used, as rounded there.

    logp never passes through z - lse, whose rounding at a logit offset of 9000 is 4e-4 in fp32.  A stray label gives NaN,
    decided from the label (as -inf it would stay silently finite in losses that use only p); a masked row gives 0.  A row whose largest
    logit is beyond what the kernels can subtract (1.49e9 in fp32, see FAR) gives NaN.
    """
    m2_T, s_T, t_T, z_T = partials_T4.double().unbind(-1)
    s_T = s_T.masked_fill(m2_T.abs() >= FAR[work], math.nan)
    log2_s_T = s_T.log2()
    logp_T = LN2 * (z_T * shard.scale2(work) - m2_T - log2_s_T)
    entropy_T = (LN2 * log2_s_T - t_T / s_T).clamp(min=0)
    lse_T = LN2 * (m2_T + log2_s_T)
    masked_T = labels_T == shard.ignore_index
    logp_T = logp_T.masked_fill(shard.stray(labels_T), math.nan)
    logp_T, entropy_T, lse_T = (x.masked_fill(masked_T, 0.0) for x in (logp_T, entropy_T, lse_T))
    return logp_T, entropy_T, lse_T, torch.stack((m2_T, s_T, logp_T, entropy_T), -1)
