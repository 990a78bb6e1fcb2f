"""The row kernels in plain PyTorch, tile by tile: for fp64, and where neither Triton nor a C++ compiler is at hand.

Works in the logits' precision, at least fp32.  A tile is [ROWS, COLUMNS], so the extra memory is a few MiB whatever the vocabulary
(never a [tokens, vocabulary] copy) and a tile stays in cache between the operations on it.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.partials import FAR, LN2

ROWS, COLUMNS = 64, 8192
FLOOR = -1e4  # 2^-1e4 is exactly 0 in fp64 too: -inf columns then contribute 0 instead of 0 * inf


def _tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, height, ROWS):
        for j in range(0, width, COLUMNS):
            yield slice(i, min(i + ROWS, height)), slice(j, min(j + COLUMNS, width))


def _exponents(logits: Tensor, rows: slice, columns: slice, reference_T: Tensor, scale2: float) -> Tensor:
    """(x - reference) * scale2 of a tile.  The subtraction comes first: it is exact where it matters, with no fused multiply-add."""
    tile = logits[rows, columns].to(reference_T.dtype) - reference_T[rows, None]
    return tile.mul_(scale2).clamp_(min=FLOOR)


def raise_if_stray(labels_T: Tensor, shard: Shard) -> None:
    """ValueError for the first label that is neither in the vocabulary nor the ignore index."""
    stray_T = shard.stray(labels_T)
    if stray_T.any():
        row = int(stray_T.nonzero()[0])
        raise ValueError(
            f"label {int(labels_T[row])} at row {row} is outside the vocabulary [0, {shard.vocab_size}) and is not "
            f"ignore_index={shard.ignore_index}: was the data tokenized with another tokenizer?"
        )


def stats_eager(logits: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """[T, V] logits -> [T, 4] partials (m2, s, t, z_y) in fp32 (fp64 for fp64 logits).  ValueError for a stray label (CPU only)."""
    if not logits.is_cuda:  # on a GPU the check would stall the queue; there a stray label becomes NaN
        raise_if_stray(labels, shard)
    T, V = logits.shape[0], shard.columns(logits)
    work = torch.promote_types(logits.dtype, torch.float32)
    scale2 = shard.scale2(work)
    s_T, t_T = (torch.zeros(T, dtype=torch.float64, device=logits.device) for _ in range(2))
    top_T = logits[:, :V].amax(1).to(work) if V else logits.new_full((T,), -math.inf, dtype=work)
    reference_T = top_T.clamp(min=-1e30)
    for rows, columns in _tiles(T, V):
        y = _exponents(logits, rows, columns, reference_T, scale2)
        e = torch.exp2(y)
        s_T[rows] += e.sum(1)
        t_T[rows] += y.mul_(e).sum(1)
    # m2 is rounded to the working precision; what the rounding moved is put back into s and t.  Columns that are all -inf or masks of -1e10,
    # say, get the lowest reference and nothing else: theirs would be rounded too far to be put back
    exact_T = reference_T.double() * scale2
    below_T = exact_T <= -FAR[work]
    m2_T = exact_T.to(work).masked_fill(below_T, -FAR[work])
    moved_T, s_T, t_T = (x.masked_fill(below_T, 0.0) for x in (exact_T - m2_T, s_T, t_T))
    t_T, s_T = torch.exp2(moved_T) * (t_T + moved_T * s_T) * LN2, torch.exp2(moved_T) * s_T
    y_T = labels - shard.vocab_start
    held_T = (y_T >= 0) & (y_T < V)
    z_T = logits.gather(1, y_T.where(held_T, 0)[:, None])[:, 0].to(work) if V else top_T
    z_T = z_T.where(held_T, -math.inf)
    partials_T4 = torch.stack((m2_T, s_T.to(work), t_T.to(work), z_T), -1)
    masked_T = labels == shard.ignore_index
    return torch.where(masked_T[:, None], partials_T4.new_tensor([0.0, 1.0, 0.0, 0.0]), partials_T4)


def grad_eager(logits: Tensor, out: Tensor, labels: Tensor, rows: Tensor, grads: Tensor, shard: Shard) -> None:
    """Write dF/dlogits [T, V] into `out` (may be `logits`) from rows (m2, s, logp, H) [T, 4] and (a, b, c) [T, 3]."""
    T, V = logits.shape[0], shard.columns(logits)
    work = torch.promote_types(logits.dtype, torch.float32)
    scale2 = shard.scale2(work)
    m2_T, s_T, logp_T, entropy_T = rows.double().unbind(1)
    a_T, b_T, c_T = grads.double().unbind(1)
    dead_T = (labels == shard.ignore_index) | ((a_T == 0) & (b_T == 0) & (c_T == 0))
    a_T = a_T.where(~logp_T.isnan(), logp_T)  # a stray label must not turn into a finite push against the whole vocabulary
    reference_T = (m2_T / scale2).to(work)
    moved_T = reference_T.double() * scale2 - m2_T
    p_scale_T = torch.exp2(moved_T) / (s_T * shard.temperature)
    B_T = -b_T * LN2 * p_scale_T
    A_T = -(a_T - c_T + b_T * (entropy_T - LN2 * s_T.log2())) * p_scale_T + B_T * moved_T
    A_T, B_T = A_T.to(work), B_T.to(work)
    p_T = logp_T.exp()
    spread_T = torch.where(p_T == 0, 0.0, p_T * (c_T - b_T * (logp_T + entropy_T)))
    label_T = (a_T * -torch.expm1(logp_T) + spread_T) / shard.temperature

    for tile_rows, columns in _tiles(T, V):
        y = _exponents(logits, tile_rows, columns, reference_T, scale2)
        e = torch.exp2(y)
        dx = y.mul_(B_T[tile_rows, None]).add_(A_T[tile_rows, None]).mul_(e)
        out[tile_rows, columns] = dx.masked_fill_(dead_T[tile_rows, None], 0.0).to(out.dtype)
    out[:, V:] = 0
    y_T = labels - shard.vocab_start
    held_T = (y_T >= 0) & (y_T < V) & ~dead_T
    if V:  # no host sync: a row whose label is elsewhere writes back what it already holds
        index_T1 = y_T.where(held_T, 0)[:, None]
        out.scatter_(1, index_T1, torch.where(held_T[:, None], label_T[:, None].to(out.dtype), out.gather(1, index_T1)))
