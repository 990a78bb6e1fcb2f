"""Triton kernel: one read of the logits -> per-row partial sums of the softmax, its entropy and the label's logit.

T rows (tokens), V columns of this shard.  One program per row; every config is fixed (no autotuning: a training step must not
pause to search, and all ranks must run the same code).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_plugin.kernels.layout import KernelCall, Shard, aligned_rows, vector_width
from megatron_plugin.kernels.row import EMPTY, FLOOR, LN2, aligned_body, edge_columns, exponent

BLOCK = 4096    # 32 elements per thread: the two block reductions then cost under one instruction per element
NUM_WARPS = 4
NUM_STAGES = 3  # cp.async double buffering of the block to come


@triton.jit
def _fold(m2, s, t, x, scale2):
    """Add a block of raw logits x to (reference, sum of 2^y, sum of y 2^y), y = x * scale2 - reference.

    The maximum is taken per block, not per lane: a per-lane running maximum costs a second exp2 per element.
    """
    m2_new = tl.maximum(m2, tl.max(x, 0) * scale2)
    y = exponent(x, scale2, m2_new)
    e = tl.exp2(y)
    shift = tl.maximum(m2 - m2_new, FLOOR)
    rescale = tl.exp2(shift)
    t = (t + s * shift) * rescale + tl.sum(y * e, 0)
    s = s * rescale + tl.sum(e, 0)
    return m2_new, s, t


@triton.jit
def row_partials(X, first, V, y, scale2, VEC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """(m2, s, t in base-2 units, z_y) of the V columns from element `first` on; z_y = -inf unless 0 <= y < V."""
    head, body = aligned_body(first, V, VEC)
    column, real = edge_columns(head, body, V, VEC)
    edges = tl.load(X + first + column, mask=real, other=-float("inf")).to(tl.float32)
    nothing = tl.full((), 0.0, tl.float32)
    m2, s, t = _fold(nothing + EMPTY, nothing, nothing, edges, scale2)

    lane = tl.arange(0, BLOCK)
    x_body = X + tl.multiple_of(first + head, VEC)
    full = body // BLOCK
    for block in tl.range(0, full, num_stages=STAGES):
        x = tl.load(x_body + block * BLOCK + lane).to(tl.float32)
        m2, s, t = _fold(m2, s, t, x, scale2)
    rest = tl.multiple_of(body - full * BLOCK, VEC)
    x = tl.load(x_body + full * BLOCK + lane, mask=lane < rest, other=-float("inf")).to(tl.float32)
    m2, s, t = _fold(m2, s, t, x, scale2)
    z_label = tl.load(X + first + y, mask=(y >= 0) & (y < V), other=-float("inf")).to(tl.float32)
    return m2, s, t, z_label


@triton.jit
def stats_kernel(
    X, LABELS, OUT,                                     # [T, V] logits (16-byte aligned pointer), [T] int64, [T, 4] fp32
    stride, lead, V, vocab_start, ignore_index, scale2,
    VEC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """OUT[row] = (m2, s, t, z_y); z_y = -inf where this shard does not hold the label.  A masked row is not read."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    masked = label == ignore_index
    V = tl.where(masked, 0, V)
    m2, s, t, z_label = row_partials(X, row * stride + lead, V, label - vocab_start, scale2, VEC, BLOCK, STAGES)
    OUT += row * 4
    tl.store(OUT, tl.where(masked, 0.0, m2))
    tl.store(OUT + 1, tl.where(masked, 1.0, s))
    tl.store(OUT + 2, tl.where(masked, 0.0, t * LN2))
    tl.store(OUT + 3, tl.where(masked, 0.0, z_label))


def stats_call(logits: Tensor, labels: Tensor, shard: Shard) -> tuple[KernelCall, Tensor]:
    """The launch of `stats_kernel` on logits [T, V] and the [T, 4] tensor it fills."""
    out = torch.empty(logits.shape[0], 4, dtype=torch.float32, device=logits.device)
    base, lead = aligned_rows(logits)
    args = (base, labels, out, logits.stride(0), lead, shard.columns(logits), shard.vocab_start, shard.ignore_index, shard.scale2(torch.float32))
    options = dict(VEC=vector_width(logits), BLOCK=BLOCK, STAGES=NUM_STAGES, num_warps=NUM_WARPS)
    return KernelCall(stats_kernel, (logits.shape[0],), args, options), out


def stats_triton(logits: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """[T, V] logits -> [T, 4] fp32 partials (m2, s, t, z_y) of this shard."""
    call, out = stats_call(logits, labels, shard)
    call.launch()
    return out
