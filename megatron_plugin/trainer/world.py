"""The ranks of a job while something is done with a model: process group, megatron-core's groups, CPU stand-ins, seeds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_plugin.config import Config
from megatron_plugin.hooks.cpu_platform import cpu_platform

__all__ = ["process_group", "seed_everything", "world"]


@contextlib.contextmanager
def world(config: Config) -> Iterator[None]:
    """Inside, megatron-core's groups are those of `config.parallel`, and its random numbers those of step 0."""
    with process_group(config), cpu_platform():
        parallel = config.parallel
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None, context_parallel_size=parallel.context,
        )  # fmt: skip
        seed_everything(config, 0)
        yield


def seed_everything(config: Config, step: int) -> None:
    """Random numbers of a step depend on the step alone, so a resumed run draws those of the undisturbed one; stages draw their own."""
    seed = config.seed + 100 * parallel_state.get_pipeline_model_parallel_rank() + 100_003 * step
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextlib.contextmanager
def process_group(config: Config) -> Iterator[None]:
    """The world torchrun made, or a world of one; a caller's own process group is used as it is, and kept."""
    if dist.is_initialized():
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=config.train.timeout_s), **_store())
    yield
    parallel_state.destroy_model_parallel()  # not after an error: tearing down NCCL can wait for ranks that will never come
    dist.destroy_process_group()


def _store() -> dict[str, object]:
    """Where the ranks find each other: torchrun's store, or none for a run alone.

    torchrun keeps one store over its restarts (--max-restarts), with the addresses of the dead ranks in it: gloo then tries those (measured: "connectFullMesh
    failed, Connection refused"), so each restart gets names of its own."""
    if "RANK" not in os.environ:
        return dict(rank=0, world_size=1, store=dist.HashStore())
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return {}
    store, rank, size = next(dist.rendezvous("env://"))
    return dict(rank=rank, world_size=size, store=dist.PrefixStore(f"restart {restarts}", store))
