"""megatron-core's Python on CPU tensors, where there is no GPU: reversible, and announced when it starts.

This is one of the two rooms (CONTRIBUTING.md) in which names that are not ours are replaced (the other is hooks/gpt_model.py).  What makes
that bearable: nothing happens on a machine with CUDA, everything is put back on exit, and each part is here because megatron-core fails
without it (measured on 0.16.1, torch 2.13 without CUDA, gloo):

  _rng_tracker     the tracker in megatron-core's own slot (tensor_parallel.random) becomes one on the CPU generator
                   without it: model_parallel_cuda_manual_seed says "Torch not compiled with CUDA enabled"; without seeding, attention
                   dropout finds no RNG state, even at p = 0
  _cuda_functions  torch.cuda.current_device gives torch.device("cpu"): else the same error in TP mappings, linear layers, DDP's buffers
                   torch.cuda.synchronize does nothing: else the same in the checkpoint writer and in batched P2P
                   torch.cuda.current_stream waits for nothing: else the same in DDP's start_grad_sync, from 0.19 on
  _CudaMeansCpu    a TorchFunctionMode, which replaces no name: literals such as torch.zeros([], device="cuda") in schedules.py and in the
                   optimizers mean the CPU

What this is not: megatron-core's CUDA path.  Streams and overlap do nothing, and what needs a CUDA kernel (Transformer Engine, MoE,
activation recompute, which saves CUDA generator states) still fails.  The mode acts in the thread that entered it; autograd runs CPU
backwards in the calling thread, so they are covered.  The two other parts act on the whole process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

__all__ = ["cpu_platform"]

_CPU = torch.device("cpu")
_NOTICE = (
    "cpu_platform: no CUDA device here, so megatron-core's Python runs on CPU tensors (its RNG tracker and torch.cuda.current_device, "
    "synchronize and current_stream are stand-ins until exit); for checking and small models, not for speed"
)


@contextlib.contextmanager
def cpu_platform() -> Iterator[None]:
    """Inside, megatron-core builds and trains on CPU tensors.  Does nothing where CUDA is available, or inside another cpu_platform().

    Enter it before model_parallel_cuda_manual_seed and leave it after the last step.  Rank 0 prints one line."""
    if torch.cuda.is_available() or isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, CpuRngTracker):
        yield
        return
    if os.environ.get("RANK", "0") == "0":
        print(_NOTICE, flush=True)
    with _rng_tracker(), _cuda_functions(), _CudaMeansCpu():
        yield


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's named RNG states, kept on the CPU generator."""

    def reset(self) -> None:
        super().reset()
        self._entered: str | None = None

    def add(self, name: str, seed: int) -> None:
        """Start the stream `name` from `seed`.  ValueError when either is taken: equal streams would repeat each other's dropout."""
        if name in self.states_ or seed in self.seeds_:
            raise ValueError(f"RNG stream '{name}' with seed {seed}: the name or the seed is taken; streams so far: {sorted(self.states_)}")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Inside, the CPU generator continues the stream `name`; outside it goes on as if nothing had been drawn."""
        if name not in self.states_:
            raise KeyError(f"RNG stream '{name}' was never added; call megatron.core.tensor_parallel.model_parallel_cuda_manual_seed first")
        outer, outside = self._entered, torch.get_rng_state()
        if outer is not None:  # a fork of the stream we are in has to continue it, not to repeat it
            self.states_[outer] = outside
        torch.set_rng_state(self.states_[name])
        self._entered = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside if outer is None else self.states_[outer])
            self._entered = outer


@contextlib.contextmanager
def _rng_tracker() -> Iterator[None]:
    """A CPU tracker in megatron's own slot; marked initialised, or get_cuda_rng_tracker() would put a CUDA one in its place."""
    with (
        _replaced(megatron_random, "_CUDA_RNG_STATE_TRACKER", CpuRngTracker()),
        _replaced(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
    ):
        yield


@contextlib.contextmanager
def _cuda_functions() -> Iterator[None]:
    """megatron-core uses current_device() only as `device=`, so a torch.device serves."""
    with (
        _replaced(torch.cuda, "current_device", lambda: _CPU),
        _replaced(torch.cuda, "synchronize", lambda device=None: None),
        _replaced(torch.cuda, "current_stream", lambda device=None: _NoStream()),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _NoStream:
    """CPU work is done when the call returns: there is never anything to wait for."""

    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


class _CudaMeansCpu(TorchFunctionMode):
    """Requests for CUDA memory get CPU memory, and a CPU tensor says the CUDA type name that megatron's optimizers look for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):  # RoPE and the data helpers ask for it; without a driver it is an error
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # the query t.type(), not the cast t.type(dtype)
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (isinstance(device, str) and device.split(":")[0] == "cuda")
