"""One-pass loss in CUDA C++ (csrc/cluster_loss.cu) for Hopper GPUs: each logit is read once and its gradient written once.

Chosen by name only: `with use_backend("cluster")`.  Built by nvcc at first use, once for every loss and dtype.  No GPU has run it yet.
T tokens, V columns, C columns of the table (objective.COLUMNS and the loss's own metrics).
"""

import ctypes
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_plugin.kernels import build
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.objective import COLUMNS, INPUTS, MAX_PARAMS, Number, Objective
from megatron_plugin.kernels.token_stats import Gather, one_shard
from megatron_plugin.kernels.twin_cuda import translate

ELEMENTS = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "Float32"}
FLAGS = ("-O3", "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC")
CLUSTERS = (1, 2, 4, 8, 16)          # 16 only where it must be: it needs a whole group of multiprocessors
BLOCK_LIMIT = 227 * 1024             # shared memory one thread block of sm_90 may have, bytes
MULTIPROCESSOR_LIMIT = 228 * 1024    # of one multiprocessor, which takes 1 KiB for itself from each block
MAIL_BYTES, INBOX_BYTES = 384, 32    # behind the slice (struct Mail); per block of the cluster
REMEDY = "use backend 'triton' (or 'auto')"


class _Number(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("value", ctypes.c_float)]


class Job(ctypes.Structure):
    """One launch: struct Job of csrc/cluster_row.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p), ("out", ctypes.c_void_p), ("labels", ctypes.c_void_p), ("table", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p * len(INPUTS)), ("numbers", _Number * (MAX_PARAMS + 3)),
        ("stride", ctypes.c_int64), ("stride_out", ctypes.c_int64), ("tokens", ctypes.c_int64),
        ("vocab_start", ctypes.c_int64), ("vocab_size", ctypes.c_int64), ("ignore_index", ctypes.c_int64),
        ("width", ctypes.c_int32), ("valid", ctypes.c_int32), ("slice_vectors", ctypes.c_int32),
        ("scale2", ctypes.c_float), ("inv_temperature", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a row is dealt to the thread blocks of a cluster."""

    cluster: int
    """Thread blocks per row."""
    slice_vectors: int
    """16-byte vectors of the row in one block."""
    shared_bytes: int
    """Shared memory of one block."""

    @classmethod
    def cut(cls, columns: int, element_size: int, cluster: int) -> "Plan":
        vectors = -(-(columns * element_size // 16) // cluster)
        return cls(cluster, vectors, vectors * 16 + MAIL_BYTES + INBOX_BYTES * cluster)

    def blocks_per_multiprocessor(self) -> int:
        return MULTIPROCESSOR_LIMIT // (-(-self.shared_bytes // 128) * 128 + 1024)


def plan(columns: int, element_size: int) -> Plan:
    """The smallest cluster that leaves room for two blocks on a multiprocessor: while one computes with nothing in flight, the other loads.

    Larger ones wait longer for their slowest block.  ValueError for a row that 16 blocks cannot hold.
    """
    plans = [Plan.cut(columns, element_size, cluster) for cluster in CLUSTERS]
    for p in plans:
        if p.blocks_per_multiprocessor() >= 2:
            return p
    if plans[-1].shared_bytes > BLOCK_LIMIT:
        raise ValueError(f"backend 'cluster' got rows of {columns} columns, {element_size} bytes each; 16 blocks hold {16 * BLOCK_LIMIT >> 10} KiB: {REMEDY}")
    return plans[-1]


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))
    if found is None:
        raise RuntimeError(
            f"backend 'cluster' is compiled at first use and needs nvcc (CUDA 12 or later), which is neither on PATH nor in {home}/bin; install the "
            f"CUDA toolkit, name nvcc in NVCC, or {REMEDY}"
        )
    return found


class Library:
    """The functions of csrc/cluster_launch.cuh.  RuntimeError with CUDA's own words when one fails."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.cluster_loss_error.restype = ctypes.c_char_p
        self._clusters: dict[tuple[int, Plan], int] = {}

    def _check(self, code: int, what: str) -> None:
        if code:
            raise RuntimeError(f"cluster kernel, {what}: {self._library.cluster_loss_error(code).decode()} (error {code}); {REMEDY}")

    def clusters(self, device: int, plan: Plan) -> int:
        """How many clusters run on the device at the same time."""
        if (device, plan) not in self._clusters:
            found = ctypes.c_int(0)
            code = self._library.cluster_loss_prepare(device, plan.cluster, plan.shared_bytes, ctypes.byref(found))
            self._check(code, f"preparing {plan}")
            if found.value < 1:
                raise RuntimeError(f"cluster kernel: this GPU runs no cluster of {plan.cluster} blocks with {plan.shared_bytes} bytes; {REMEDY}")
            self._clusters[device, plan] = found.value
        return self._clusters[device, plan]

    def launch(self, job: Job, device: int, plan: Plan, stream: int) -> None:
        clusters = min(job.tokens, self.clusters(device, plan))
        code = self._library.cluster_loss_launch(ctypes.byref(job), device, plan.cluster, clusters, plan.shared_bytes, ctypes.c_void_p(stream))
        self._check(code, f"launching {clusters} of {plan}")


@cache
def library(dtype: torch.dtype, twin: str) -> Library:
    """The kernel for logits of `dtype` and a loss from `twin_cuda.translate`; compiled in some seconds if no cached object fits."""
    return Library(build.load("cluster_loss.cu", (*FLAGS, f"-DELEMENT={ELEMENTS[dtype]}"), compile_with=_nvcc(), header=twin))


def _job(
    logits: Tensor, out: Tensor | None, labels: Tensor, table: Tensor, inputs: Sequence[Tensor | None], tensors: Sequence[Tensor | None],
    numbers: Sequence[float], shard: Shard, plan: Plan,
) -> Job:  # fmt: skip
    """The launch as the kernel reads it.  Only addresses are kept: the caller holds the tensors."""
    at = lambda x: None if x is None else x.data_ptr()  # noqa: E731
    return Job(
        logits.data_ptr(), at(out), labels.data_ptr(), table.data_ptr(), (ctypes.c_void_p * len(INPUTS))(*map(at, inputs)),
        (_Number * len(numbers))(*((at(x), value) for x, value in zip(tensors, numbers, strict=True))),
        logits.stride(0), logits.stride(0) if out is None else out.stride(0), logits.shape[0], shard.vocab_start, shard.vocab_size,
        shard.ignore_index, logits.shape[1], shard.columns(logits), plan.slice_vectors, shard.scale2(torch.float32), 1.0 / shard.temperature,
    )  # fmt: skip


def _stop(got: str, expected: str):
    raise ValueError(f"backend 'cluster' got {got}, expected {expected}: {REMEDY}")


def _check_device(logits: Tensor) -> None:
    if not logits.is_cuda or torch.cuda.get_device_capability(logits.device) != (9, 0):
        name = torch.cuda.get_device_name(logits.device) if logits.is_cuda else f"the {logits.device.type}"
        _stop(f"logits on {name}", "a GPU of compute capability 9.0 (H100, H200, GH200)")


def _check(logits: Tensor, out: Tensor | None, objective: Objective, gather: Gather) -> None:
    """ValueError for what this kernel cannot do, with the remedy."""
    _check_device(logits)
    if gather is not one_shard:
        _stop("a vocabulary split over ranks", "whole rows on one rank (no tp_group)")
    if objective.twin is None:
        _stop("a loss without a twin", "one of LOSSES, or a TokenLoss with a @triton.jit twin (kernels/weighting.py)")
    if logits.dtype not in ELEMENTS:
        _stop(f"{logits.dtype} logits", "bf16, fp16 or fp32")
    if out is None:
        return
    if out.dtype != logits.dtype:
        _stop(f"{logits.dtype} logits with a gradient in {out.dtype}", "one dtype")
    row_shift = (out.stride(0) - logits.stride(0)) * logits.element_size() % 16 if logits.shape[0] > 1 else 0
    if (out.data_ptr() - logits.data_ptr()) % 16 or row_shift:
        _stop("a gradient whose rows lie otherwise to 16-byte boundaries than the logits'", "one from layout.empty_like_rows, or the logits")


def _operands(objective: Objective, device: torch.device) -> tuple[list[Tensor | None], list[Tensor | None], list[float]]:
    """(inputs in fp32 or None, numbers in device memory or None, numbers) of an objective, in the order of struct Job."""
    given = [objective.inputs.get(name) for name in INPUTS]
    inputs = [None if x is None else x.to(torch.float32).contiguous() for x in given]
    params: list[Number] = [*objective.twin.params, *[0.0] * (MAX_PARAMS - len(objective.twin.params))]
    all_numbers = [objective.grad_scale, *params, objective.entropy_bonus, objective.z_loss]
    # a tensor on the CPU is read for nothing; copying it over would wait for the queue
    tensors = [x.to(torch.float32) if isinstance(x, Tensor) and x.device == device else None for x in all_numbers]
    return inputs, tensors, [float(x) if t is None else 0.0 for x, t in zip(all_numbers, tensors, strict=True)]


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@torch.library.custom_op("megatron_plugin::cluster_loss", mutates_args=("out",))
def _cluster_loss(
    logits: Tensor, out: Tensor | None, labels: Tensor, inputs: list[Tensor | None], tensors: list[Tensor | None], numbers: list[float],
    twin: str, metrics: int, vocab_start: int, vocab_size: int, ignore_index: int, temperature: float,
) -> Tensor:  # fmt: skip
    shard = Shard(vocab_start, vocab_size, ignore_index, temperature)
    table = logits.new_empty(len(COLUMNS) + metrics, logits.shape[0], dtype=torch.float32)
    if logits.shape[0]:
        dealt = plan(shard.columns(logits), logits.element_size())
        job = _job(logits, out, labels, table, inputs, tensors, numbers, shard, dealt)
        with torch.cuda.device_of(logits):
            library(logits.dtype, twin).launch(job, logits.device.index or 0, dealt, _stream())
    return table


@_cluster_loss.register_fake
def _(logits, out, labels, inputs, tensors, numbers, twin, metrics, vocab_start, vocab_size, ignore_index, temperature):
    return logits.new_empty(len(COLUMNS) + metrics, logits.shape[0], dtype=torch.float32)


def loss_cluster(logits: Tensor, out: Tensor | None, labels: Tensor, shard: Shard, objective: Objective, gather: Gather = one_shard) -> Tensor:
    """The table [C, T] of the objective's terms; the gradient of sum(coefficient x loss) goes into `out` unless that is None.

    out: `logits` itself or from `empty_like_rows`.  As loss.loss_triton for a whole vocabulary.
    """
    _check(logits, out, objective, gather)
    twin = translate(objective.twin.fn, objective.twin.metrics)
    labels = labels.to(torch.int64).contiguous()
    return _cluster_loss(logits, out, labels, *_operands(objective, logits.device), twin, objective.twin.metrics, *shard.arguments())
