"""Makes Triton's interpreter compute what the GPU computes, where it differs in ways these kernels can see.

Test-only: imported by conftest before any kernel when there is no GPU.  Reaches into private names of Triton 3.6-3.9.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _fma(self, x, y, z):
    """One rounding, as FFMA: numpy's x * y + z rounds twice, which at a logit offset of 1e4 is 5e-4 in the exponent."""
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)


_convert_float = interpreter._convert_float


def _round_to_nearest(x, source, target, rounding_mode=None):
    """fp32 -> bf16 to nearest even, as the GPU; the interpreter truncates.  bf16 is held as uint16 bits."""
    if target != tl.bfloat16 or source != tl.float32:
        return _convert_float(x, source, target, rounding_mode)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.reshape(np.shape(x)))


def install() -> None:
    interpreter.InterpreterBuilder.create_fma = _fma
    interpreter._convert_float = _round_to_nearest
