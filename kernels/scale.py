"""Triton kernel: multiply by the scalar that the backward brings, without a read or write where it is 1."""

import triton
import triton.language as tl
from torch import Tensor

from megatron_plugin.kernels.layout import KernelCall

BLOCK = 4096


@triton.jit
def scale_kernel(X, FACTOR, stride, V, BLOCK: tl.constexpr):
    """X[row] *= FACTOR[0]; the program of a row returns at once when the factor is 1."""
    factor = tl.load(FACTOR).to(tl.float32)
    if factor != 1.0:
        x = X + tl.program_id(0).to(tl.int64) * stride
        for column in range(0, V, BLOCK):
            lane = column + tl.arange(0, BLOCK)
            value = tl.load(x + lane, mask=lane < V, other=0.0).to(tl.float32) * factor
            tl.store(x + lane, value.to(X.dtype.element_ty), mask=lane < V)


def scale_call(x: Tensor, factor: Tensor) -> KernelCall:
    """The launch of `scale_kernel` on x [T, V] (last dimension contiguous) and a 0-d factor."""
    return KernelCall(scale_kernel, (x.shape[0],), (x, factor, x.stride(0), x.shape[1]), dict(BLOCK=BLOCK, num_warps=4))


def scale_triton(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place."""
    scale_call(x, factor).launch()
