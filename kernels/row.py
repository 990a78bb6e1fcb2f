"""@triton.jit helpers shared by the row kernels: where a row's aligned part lies, and the exponent of a column.

A row of any vocabulary and stride is cut into   edge | body | edge   so that the body starts at a 16-byte boundary and is a
whole number of 16-byte vectors.  Without the cut, Triton proves no alignment for an odd vocabulary (50257) or stride and
loads two bytes at a time.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# |m2| from which a row is NaN: m2 is rounded by up to 128 there, and 2^128 is no fp32 number
FAR = tl.constexpr(2.0**31)
# Base-2 reference of a row that has seen nothing.  Finite, so that differences with it are, and none lies below it: of a block full of masks,
# -1e10 say, it would be rounded like that
EMPTY = tl.constexpr(-(2.0**31))
FLOOR = tl.constexpr(-1000.0)  # 2^-1000 is exactly 0 in fp32: clamping here makes -inf columns contribute 0 instead of 0 * inf



@triton.jit
def aligned_body(first, V, VEC: tl.constexpr):
    """A row starts `first` elements past a 16-byte boundary: (elements before its first boundary, elements in whole vectors)."""
    head = tl.minimum(((VEC - first % VEC) % VEC).to(tl.int32), V)
    return head, (V - head) // VEC * VEC


@triton.jit
def edge_columns(head, body, V, VEC: tl.constexpr):
    """Columns outside the body, at most VEC - 1 on either side: (column, is it real)."""
    lane = tl.arange(0, 2 * VEC)
    before = lane < VEC
    column = tl.where(before, lane, head + body + lane - VEC)
    return column, tl.where(before, lane < head, column < V)


@triton.jit
def exponent(x, scale2, m2):
    """log2 of a column's share before normalisation: x * scale2 - m2 in one rounding, NaN kept, -inf floored."""
    return tl.maximum(tl.fma(x, scale2, -m2), FLOOR, propagate_nan=tl.PropagateNan.ALL)
