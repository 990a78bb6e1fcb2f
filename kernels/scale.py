"""Triton kernel: multiply rows by the scalar that the backward brings, without a read or a write where it is 1."""

import triton
import triton.language as tl
from torch import Tensor

from megatron_plugin.kernels.layout import KernelCall, aligned_rows, vector_width
from megatron_plugin.kernels.row import aligned_body, edge_columns

BLOCK = 4096
NUM_WARPS = 4


@triton.jit
def scale_kernel(X, FACTOR, stride, lead, V, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """X[row] *= FACTOR[0]; the program of a row returns at once when the factor is 1.  A zero stays zero: the factor may be inf or NaN."""
    factor = tl.load(FACTOR).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * stride + lead
        head, body = aligned_body(first, V, VEC)
        edge, real = edge_columns(head, body, V, VEC)
        edges = tl.load(X + first + edge, mask=real, other=0.0).to(tl.float32)
        tl.store(X + first + edge, tl.where(edges == 0.0, 0.0, edges * factor).to(X.dtype.element_ty), mask=real)
        lane = tl.arange(0, BLOCK)
        x_body = X + tl.multiple_of(first + head, VEC)
        for column in range(0, body, BLOCK):
            inside = lane < tl.multiple_of(body - column, VEC)
            value = tl.load(x_body + column + lane, mask=inside, other=0.0).to(tl.float32)
            tl.store(x_body + column + lane, tl.where(value == 0.0, 0.0, value * factor).to(X.dtype.element_ty), mask=inside)


def scale_call(x: Tensor, factor: Tensor) -> KernelCall:
    """The launch of `scale_kernel` on rows x [T, V] (any stride and alignment) and a 0-d factor on the same device."""
    base, lead = aligned_rows(x)
    options = dict(VEC=vector_width(x), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return KernelCall(scale_kernel, (x.shape[0],), (base, factor, x.stride(0), lead, x.shape[1]), options)


def scale_triton(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place, zeros kept."""
    scale_call(x, factor).launch()
