"""The row kernels in C++ (csrc/token_stats_cpu.cpp) for fp32, bf16 and fp16 on the CPU: same contract as eager.py, an order of magnitude faster.

T tokens, V columns of this shard.  A row's result depends neither on T nor on the number of threads.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from megatron_plugin.kernels import build
from megatron_plugin.kernels.eager import raise_if_stray
from megatron_plugin.kernels.layout import Shard

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
GRAIN = 32768  # elements that are worth a thread, as in PyTorch
PART = 65536   # columns a thread takes at once: the first block of a part is read twice, which costs 8 % at 16384
# no -march: the code chooses its instruction set itself.  Contraction on: the kernels say where a rounding matters
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno")

_forced_isa: str | None = None
_forked = False


def _after_fork() -> None:
    # OpenMP's threads stay behind in the parent; a parallel region of the child would wait for them for ever
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)


@cache
def native(source: str) -> tuple[ctypes.CDLL | None, str]:
    """(the library made of csrc/`source`, "") or (None, why not)."""
    reasons = []
    for threads in (("-fopenmp",), ()):  # Apple's compiler has no OpenMP: one thread is still far ahead of eager
        try:
            return build.load(source, (*FLAGS, *threads)), ""
        except build.BuildError as error:
            reasons.append(str(error))
    return None, reasons[0]


def threads(work: int) -> int:
    """Threads for that many elements: PyTorch's number, fewer for little work, one in a forked process."""
    return 1 if _forked else max(1, min(torch.get_num_threads(), work // GRAIN))


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    library, why = native("token_stats_cpu.cpp")
    if library is not None:
        i, l, f, d, p = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_void_p
        library.megatron_plugin_isa.argtypes = []
        library.megatron_plugin_stats.argtypes = [i, i, p, i, l, l, l, l, p, l, l, f, p, p]
        library.megatron_plugin_grad.argtypes = [i, i, p, i, l, p, i, l, l, l, l, l, p, p, p, l, l, f, d]
        library.megatron_plugin_stats.restype = library.megatron_plugin_grad.restype = None
    return library, why


@cache
def available() -> bool:
    """Whether the kernels can be had, building them if need be; if not, says so once."""
    library, why = _load()
    if library is None:
        warnings.warn(f"no C++ row kernels, the slower PyTorch path is used on CPU tensors: {why}", RuntimeWarning, stacklevel=2)
    return library is not None


def _library() -> ctypes.CDLL:
    library, why = _load()
    if library is None:
        raise RuntimeError(f"backend 'cpp' was asked for, but: {why}")
    return library


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Force an instruction set of ISAS inside the block, for the whole process."""
    global _forced_isa
    if name not in supported_isas():
        raise ValueError(f"instruction set '{name}' is not to be had here; choose one of {', '.join(supported_isas())}")
    before, _forced_isa = _forced_isa, name
    try:
        yield
    finally:
        _forced_isa = before


def supported_isas() -> tuple[str, ...]:
    """Instruction sets of this CPU, the one that is used last."""
    return ISAS[: _library().megatron_plugin_isa() + 1]


def _start(logits: Tensor) -> tuple[ctypes.CDLL, int, int]:
    """(library, instruction set, threads) for logits that the kernels can take."""
    if logits.device.type != "cpu" or logits.dtype not in DTYPES:
        raise ValueError(f"backend 'cpp' got {logits.dtype} logits on {logits.device}; it takes fp32, bf16 and fp16 on the CPU: use backend 'auto'")
    library = _library()
    isa = library.megatron_plugin_isa() if _forced_isa is None else ISAS.index(_forced_isa)
    return library, isa, threads(logits.numel())


def _part(width: int) -> int:
    """Columns per part: equal parts of at most PART, whole cache lines."""
    return -(-width // max(1, -(-width // PART)) // 64) * 64 or 64


def stats_cpp(logits: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """[T, V] logits -> [T, 4] fp32 partials (m2, s, t, z_y).  ValueError for a stray label."""
    library, isa, workers = _start(logits)
    raise_if_stray(labels, shard)
    T, V = logits.shape[0], shard.columns(logits)
    labels, part = labels.contiguous(), _part(V)
    scratch_TP3 = torch.empty(T, -(-V // part), 3, dtype=torch.float64)
    out_T4 = torch.empty(T, 4)
    library.megatron_plugin_stats(
        isa, workers, logits.data_ptr(), DTYPES[logits.dtype], T, V, logits.stride(0), part, labels.data_ptr(), shard.vocab_start,
        shard.ignore_index, shard.scale2(torch.float32), scratch_TP3.data_ptr(), out_T4.data_ptr(),
    )
    return out_T4


def grad_cpp(logits: Tensor, out: Tensor, labels: Tensor, rows: Tensor, grads: Tensor, shard: Shard) -> None:
    """Write dF/dlogits [T, V] into `out` (`logits` itself, or other memory in any dtype of DTYPES) from rows [T, 4] and (a, b, c) [T, 3]."""
    library, isa, workers = _start(logits)
    _start(out)
    (T, V), valid = logits.shape, shard.columns(logits)
    labels, rows, grads = labels.contiguous(), rows.double().contiguous(), grads.double().contiguous()
    library.megatron_plugin_grad(
        isa, workers, logits.data_ptr(), DTYPES[logits.dtype], logits.stride(0), out.data_ptr(), DTYPES[out.dtype], out.stride(0),
        T, V, valid, _part(V), labels.data_ptr(), rows.data_ptr(), grads.data_ptr(), shard.vocab_start, shard.ignore_index,
        shard.scale2(torch.float32), 1.0 / shard.temperature,
    )
