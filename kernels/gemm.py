"""Matrix products whose result is more precise than their factors: fp32 from half precision, by whatever this torch and device offer.

n tokens of a chunk, V columns of this shard, H hidden.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from megatron_plugin.kernels.cpu_gemm import mm_fp32_, offers_mm_fp32

# elements of a [vocabulary block, H] temporary.  CUDA: 16 MiB of fp32, which stay in the cache until they are added, and 128 tiles of 128 x 256,
# one for almost every multiprocessor (not measured).  CPU: a share of its cache
BLOCK = {"cuda": 2**22, "cpu": 2**20}


def vocabulary_blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of [V, H] in blocks of bounded size."""
    V, H = weight.shape
    step = max(64, BLOCK.get(weight.device.type, BLOCK["cuda"]) // max(H, 1) // 64 * 64)
    return (slice(begin, min(begin + step, V)) for begin in range(0, V, step))


@cache
def _offers_fp32(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.mm / torch.addmm write fp32 from `dtype` there: mm does on CUDA since torch 2.8, addmm into an fp32 sum only later."""
    a, fp32 = torch.zeros(8, 8, device=device, dtype=dtype), torch.zeros(8, 8, device=device)
    try:
        if op == "mm":
            torch.mm(a, a, out_dtype=torch.float32, out=fp32)
        else:
            torch.addmm(fp32, a, a, out_dtype=torch.float32, out=fp32)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def _ours(x: Tensor) -> bool:
    """Whether the C++ product (cpu_gemm.py) takes these factors."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and offers_mm_fp32()


def project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, V] = x weight^T; accumulated in fp32 at least, rounded once to out's dtype."""
    if out.dtype == x.dtype:
        torch.mm(x, weight.t(), out=out)
    elif _ours(x):
        mm_fp32_(out, x, weight.t(), False)
    elif _offers_fp32("mm", x.device, x.dtype):
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        x = x.to(out.dtype)
        for block in vocabulary_blocks(weight):
            torch.mm(x, weight[block].to(out.dtype).t(), out=out[:, block])


def accumulate_(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total [V, H] += dz^T x, for dz [n, V] and x [n, H] of one dtype.

    A total in the factors' dtype is rounded once per call, an fp32 total of half-precision factors gets the fp32 product.  Only on a CPU
    without the C++ product is that first rounded to half precision.
    """
    if total.dtype == dz.dtype:
        total.addmm_(dz.t(), x)
    elif total.dtype == torch.float32 and _ours(x):
        mm_fp32_(total, dz.t(), x, True)
    elif total.dtype == torch.float32 and _offers_fp32("addmm", dz.device, dz.dtype):
        torch.addmm(total, dz.t(), x, out_dtype=torch.float32, out=total)
    else:
        exact = {"out_dtype": torch.float32} if total.dtype == torch.float32 and _offers_fp32("mm", dz.device, dz.dtype) else {}
        for block in vocabulary_blocks(total):
            total[block].add_(torch.mm(dz[:, block].t(), x, **exact))


def assign_(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total [V, H] = dz^T x, as `accumulate_` on zeros but without writing and reading them: 3 % of the three GEMMs of a large head."""
    if total.dtype == dz.dtype:
        torch.mm(dz.t(), x, out=total)
    elif total.dtype == torch.float32 and _ours(x):
        mm_fp32_(total, dz.t(), x, False)
    elif total.dtype == torch.float32 and _offers_fp32("mm", dz.device, dz.dtype):
        torch.mm(dz.t(), x, out_dtype=torch.float32, out=total)
    else:
        accumulate_(total.zero_(), dz, x)
