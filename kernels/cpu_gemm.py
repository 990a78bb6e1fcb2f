"""bf16 x bf16 -> fp32 matrix product on CPUs with AVX512-BF16 (csrc/gemm_cpu.cpp), which PyTorch has on CUDA only.

    megatron_plugin::mm_fp32_(out [M, N] fp32, a [M, K] bf16, b [K, N] bf16, accumulate)         out = a b, or out += a b

Of what this torch exports, cblas_gemm_bf16bf16f32 (MKL) runs at 21 % of torch.mm's bf16 speed on Zen 5 and oneDNN's product refuses an fp32 result;
this one runs at 94 to 109 % of it (torch 2.13, one thread, 512 x 1024 x 32768 in three layouts).
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from megatron_plugin.kernels import cpu


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(the library, "") or (None, why not)."""
    library, why = cpu.native("gemm_cpu.cpp")
    if library is None:
        return None, why
    if not library.megatron_plugin_mm_fp32_runs():
        return None, "this CPU has no AVX512-BF16"
    i, l, p = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.megatron_plugin_mm_fp32_scratch.argtypes, library.megatron_plugin_mm_fp32_scratch.restype = [i, l, l, l], l
    library.megatron_plugin_mm_fp32.argtypes, library.megatron_plugin_mm_fp32.restype = [i, p, l, p, l, l, p, l, l, l, l, l, i, p], None
    return library, ""


def offers_mm_fp32() -> bool:
    """Whether `mm_fp32_` runs here, building it if need be (seconds, once per machine)."""
    return _load()[0] is not None


def _check(out: Tensor, a: Tensor, b: Tensor) -> None:
    (M, K), (K2, N) = a.shape, b.shape
    if K != K2 or out.shape != (M, N):
        raise ValueError(f"mm_fp32_ got a {list(a.shape)}, b {list(b.shape)}, out {list(out.shape)}; expected [M, K], [K, N], [M, N]")
    if (out.dtype, a.dtype, b.dtype) != (torch.float32, torch.bfloat16, torch.bfloat16):
        raise ValueError(f"mm_fp32_ got out {out.dtype}, a {a.dtype}, b {b.dtype}; expected torch.float32, torch.bfloat16, torch.bfloat16")
    if N > 1 and out.stride(1) != 1 or M > 1 and out.stride(0) < N:
        raise ValueError(f"mm_fp32_ got out with strides {out.stride()}; expected rows of contiguous columns: swap and transpose the factors")


@torch.library.custom_op("megatron_plugin::mm_fp32_", mutates_args=("out",), device_types="cpu")
def mm_fp32_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out (+)= a b with fp32 sums; a and b may be transposed views (denormal products count as 0: vdpbf16ps)."""
    _check(out, a, b)
    library, why = _load()
    if library is None:
        raise RuntimeError(f"mm_fp32_ does not run here: {why}; ask offers_mm_fp32() first, and use torch.mm on fp32 copies instead")
    (M, K), N = a.shape, b.shape[1]
    if K == 0 and not accumulate:
        out.zero_()
    workers = cpu.threads(M * N * K // 64)  # 64 products in the time of one element of a row kernel
    scratch = torch.empty(library.megatron_plugin_mm_fp32_scratch(workers, M, N, K) + 64, dtype=torch.uint8)
    aligned = -(-scratch.data_ptr() // 64) * 64
    library.megatron_plugin_mm_fp32(
        workers, out.data_ptr(), out.stride(0), a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), M, N, K, accumulate, aligned
    )


@mm_fp32_.register_fake
def _(out, a, b, accumulate):
    return None
