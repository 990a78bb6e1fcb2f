"""Triton kernel: one read of the logits, one write of their gradient (in place when asked).

    dz_v = [a 1[v = label] - p_v (a - c + b (log p_v + H))] / temperature,   a, b, c = dF/dlogp, dF/dH, dF/dlse

with p_v = 2^y / s and log p_v = ln2 (y - log2 s) this is 2^y (A + B y) off the label: one fused multiply-add, one exp2 and two
more operations per column.  The label's column is formed from scalars in fp32 and rounded once: in bf16, p - 1 read back and
corrected loses every digit from p = 0.999 on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_plugin.kernels.layout import KernelCall, Shard, aligned_rows, shared_vector
from megatron_plugin.kernels.row import LN2, LOG2E, aligned_body, edge_columns, exponent

BLOCK = 4096
NUM_WARPS = 4
NUM_STAGES = 3


@triton.jit
def gradient_scalars(a, b, c, s, logp, entropy, inv_temperature):
    """(A, B, label column): the gradient of a row is 2^y (A + B y) off the label."""
    a = tl.where(logp != logp, logp, a)  # a stray label must not turn into a finite push against the whole vocabulary
    p_scale = inv_temperature / s
    A = -(a - c + b * (entropy - LN2 * tl.log2(s))) * p_scale
    B = -b * LN2 * p_scale
    p = tl.exp2(logp * LOG2E)
    spread = tl.where(p == 0.0, 0.0, p * (c - b * (logp + entropy)))
    return A, B, (a * (1.0 - p) + spread) * inv_temperature


@triton.jit
def _gradient(x, m2, A, B, scale2):
    """Gradient of a block of raw logits x, away from the label."""
    y = exponent(x.to(tl.float32), scale2, m2)
    return tl.exp2(y) * tl.fma(B, y, A)


@triton.jit
def _fill_zero(DX, begin, count, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in columns of one row: `count` of them from element `begin` on."""
    head, body = aligned_body(begin, count, VEC)
    edge, real = edge_columns(head, body, count, VEC)
    tl.store(DX + begin + edge, tl.zeros_like(edge).to(DX.dtype.element_ty), mask=real)
    lane = tl.arange(0, BLOCK)
    dx_body = DX + tl.multiple_of(begin + head, VEC)
    zeros = tl.zeros((BLOCK,), DX.dtype.element_ty)
    for column in range(0, body, BLOCK):
        tl.store(dx_body + column + lane, zeros, mask=lane < tl.multiple_of(body - column, VEC))


@triton.jit
def write_gradient(X, DX, first, first_dx, V, valid, y, m2, A, B, dx_label, scale2, VEC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """One row's gradient: `valid` columns from X, zeros from there to V, the label's column y (if it is here) from its scalar.

    Last block first: what a pass before this one read last is what the cache still holds.
    """
    head, body = aligned_body(first, valid, VEC)
    lane = tl.arange(0, BLOCK)
    x_body = X + tl.multiple_of(first + head, VEC)
    dx_body = DX + tl.multiple_of(first_dx + head, VEC)
    full = body // BLOCK
    rest = lane < tl.multiple_of(body - full * BLOCK, VEC)
    dx_rest = _gradient(tl.load(x_body + full * BLOCK + lane, mask=rest, other=0.0), m2, A, B, scale2)
    tl.store(dx_body + full * BLOCK + lane, dx_rest.to(DX.dtype.element_ty), mask=rest)
    for block in tl.range(0, full, num_stages=STAGES):
        offset = (full - 1 - block) * BLOCK + lane
        dx = _gradient(tl.load(x_body + offset), m2, A, B, scale2)
        tl.store(dx_body + offset, dx.to(DX.dtype.element_ty))
    edge, real = edge_columns(head, body, valid, VEC)
    dx_edge = _gradient(tl.load(X + first + edge, mask=real, other=0.0), m2, A, B, scale2)
    tl.store(DX + first_dx + edge, dx_edge.to(DX.dtype.element_ty), mask=real)
    _fill_zero(DX, first_dx + valid, V - valid, VEC, BLOCK)
    if (y >= 0) & (y < valid):
        tl.debug_barrier()  # the block's own store of this column, by another thread, must land first
        tl.store(DX + first_dx + y, dx_label.to(DX.dtype.element_ty))


@triton.jit
def grad_kernel(
    X, DX, LABELS, ROWS, GRADS,                          # [T, V] logits, their gradient (may be X), [T], [T, 4], [T, 3]
    stride, stride_dx, lead, V, valid, vocab_start, ignore_index, scale2, inv_temperature,
    VEC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """ROWS[row] = (m2, s, logp, H) over the whole vocabulary; GRADS[row] = (a, b, c).  A row without gradient is not read."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    live = label != ignore_index
    m2 = tl.load(ROWS + row * 4, mask=live, other=0.0)
    s = tl.load(ROWS + row * 4 + 1, mask=live, other=1.0)
    logp = tl.load(ROWS + row * 4 + 2, mask=live, other=0.0)
    entropy = tl.load(ROWS + row * 4 + 3, mask=live, other=0.0)
    a = tl.load(GRADS + row * 3, mask=live, other=0.0)
    b = tl.load(GRADS + row * 3 + 1, mask=live, other=0.0)
    c = tl.load(GRADS + row * 3 + 2, mask=live, other=0.0)
    live = live & ((a != 0.0) | (b != 0.0) | (c != 0.0))
    A, B, dx_label = gradient_scalars(a, b, c, s, logp, entropy, inv_temperature)
    valid = tl.where(live, valid, 0)
    first, first_dx = row * stride + lead, row * stride_dx + lead
    write_gradient(X, DX, first, first_dx, V, valid, label - vocab_start, m2, A, B, dx_label, scale2, VEC, BLOCK, STAGES)


def grad_call(logits: Tensor, out: Tensor, labels: Tensor, rows: Tensor, grads: Tensor, shard: Shard) -> KernelCall:
    """The launch of `grad_kernel`; `out` is `logits` itself, comes from `empty_like_rows`, or fits `shared_vector`."""
    (T, V), valid = logits.shape, shard.columns(logits)
    (base, lead), (base_out, _) = aligned_rows(logits), aligned_rows(out)
    args = (base, base_out, labels, rows, grads, logits.stride(0), out.stride(0), lead, V, valid,
            shard.vocab_start, shard.ignore_index, shard.scale2(torch.float32), 1.0 / shard.temperature)
    options = dict(VEC=shared_vector(logits, out), BLOCK=BLOCK, STAGES=NUM_STAGES, num_warps=NUM_WARPS)
    return KernelCall(grad_kernel, (T,), args, options)


def grad_triton(logits: Tensor, out: Tensor, labels: Tensor, rows: Tensor, grads: Tensor, shard: Shard) -> None:
    """Write dF/dlogits [T, V] into `out` from per-row (a, b, c) [T, 3]."""
    grad_call(logits, out, labels, rows, grads, shard).launch()
