"""Out of memory: what was being done, how large everything is, and which key to turn, in the order in which it costs least.

    with memory_explained(config, lambda: f"step {step}", run=run):
        ...
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_plugin.config import Config
from megatron_plugin.trainer.perf import GIB, memory_gib

if TYPE_CHECKING:
    from megatron_plugin.trainer.run import Run

__all__ = ["OutOfMemoryError", "is_out_of_memory", "memory_explained", "state_bytes"]

DEVICE = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory", "Cuda failure 2 'out of memory'")
"""What a RuntimeError says of device memory that torch's allocator did not hand out: cuBLAS, Triton and NCCL ask the driver themselves."""
HOST = ("DefaultCPUAllocator", "can't allocate memory", "std::bad_alloc", "Cannot allocate memory")
"""What a RuntimeError says where the host's memory is meant."""


class OutOfMemoryError(RuntimeError):
    """This rank could not get the memory it needs; its text says what to change."""

    exit_code = 12  # ENOMEM


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's memory is what `error` is about."""
    if getattr(error, "exit_code", None) is not None:
        return False  # an error of ours, whose text may hold what another process said: an engine's log
    return _of_device(error) or isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in HOST))


def _of_device(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in DEVICE))


@contextlib.contextmanager
def memory_explained(config: Config, doing: Callable[[], str], *, run: Run | None = None) -> Iterator[None]:
    """Inside, running out of memory is an OutOfMemoryError.  run: None while it is built."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(_text(config, doing(), run, error)) from error


def state_bytes(run: Run) -> dict[str, int]:
    """{"weights", "gradients", "optimizer": bytes} that this rank holds."""
    weights = sum(p.numel() * p.element_size() for chunk in run.chunks for p in chunk.parameters())
    buffers = [buffer.grad_data for chunk in run.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {"weights": weights, "gradients": sum(_bytes(x) for x in buffers), "optimizer": _optimizer_bytes(run.optimizer)}


def _optimizer_bytes(optimizer: Any) -> int:
    """Moments and fp32 copies of the weights; 0 before the first step, when there are none yet."""
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", part)
        if inner is None:  # megatron-core's stub of a rank without parameters
            continue
        total += sum(_bytes(x) for state in inner.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.dim())
        copies = getattr(part, "fp32_from_float16_groups", None) or getattr(part, "shard_fp32_from_float16_groups", None) or []
        total += sum(_bytes(x) for group in copies for x in group if x is not None)
    return total


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _text(config: Config, doing: str, run: Run | None, error: BaseException) -> str:
    cuda = _of_device(error)
    place = f"GPU {torch.cuda.get_device_name()}" if cuda and torch.cuda.is_available() else "GPU" if cuda else "host"
    sizes = [f"{config.train.micro_batch} rows of {config.data.seq_length} tokens a forward pass"]
    if run is not None:
        sizes += [f"vocabulary {run.data.vocab_size}", *(f"{name} {size / GIB:.3g} GiB" for name, size in state_bytes(run).items())]
    sizes.append(f"this process has used {memory_gib():.3g} GiB at most")
    said = re.sub(r"\s+", " ", str(error)).strip()[:400]
    knobs = [f"  {number}. {knob}" for number, knob in enumerate(_knobs(config, cuda=cuda), 1)]
    return "\n".join([f"{doing}, rank {dist.get_rank()}: out of memory ({place}); here: {', '.join(sizes)}", f"torch: {said}", "in this order:", *knobs])


def _knobs(config: Config, *, cuda: bool) -> list[str]:
    """What this configuration has not done yet; what costs least first."""
    train, parallel, length = config.train, config.parallel, config.data.seq_length
    ranks = dist.get_world_size()
    replicas = config.data_parallel(ranks)
    found = []
    if train.micro_batch > 1:
        fewer = max(n for n in range(1, train.micro_batch) if train.micro_batch % n == 0)  # of which train.global_batch is a multiple, too
        found.append(f"train.micro_batch={fewer}: the same step in more forward passes")
    if replicas > 1 and not parallel.distributed_optimizer:
        found.append(f"parallel.distributed_optimizer=true: the optimizer's state over the {replicas} data-parallel ranks")
    if cuda and not config.model.get("recompute_granularity"):  # megatron-core's checkpointing keeps CUDA's random numbers
        found.append("model.recompute_granularity=full model.recompute_method=uniform model.recompute_num_layers=1: a third more time, activations of one layer")
    if train.dtype == "fp32":
        found.append("train.dtype=bf16: half the activations")
    found.append(f"parallel.tensor={parallel.tensor * 2} or parallel.pipeline={parallel.pipeline * 2}, with as many more ranks: weights, gradients and optimizer "
                 f"over them; parallel.context={parallel.context * 2} for the activations of long rows; parallel.sequence=true beside parallel.tensor")  # fmt: skip
    shared = 2 * parallel.context * parallel.tensor  # ranks that share a row's tokens: both halves of a causal row, and sequence parallelism
    found.append(f"data.seq_length={max(length // 2 // shared, 1) * shared}, with data.overlong=drop if samples are longer: rows are packed, so this only cuts the longest")
    if config.rollout is not None and config.rollout.engine == "vllm":
        found.append("rollout.memory lower, or rollout.sleep=true: the engine is on the same devices")
    if cuda:
        found.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, where torch says that much is reserved but unallocated")
    return found
