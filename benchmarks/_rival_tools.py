"""What several rivals need: their files, a group of one rank, a fresh copy of the logits."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_plugin.bench.cases import LogitsCase, objective_sum
from megatron_plugin.bench.harness import NotMeasured, Run
from megatron_plugin.bench.pytorch import in_place


def files_alone(module: str, *, bare: tuple[str, ...] = (), forget: bool = False) -> types.ModuleType:
    """A module of a package whose own __init__ cannot run here (it wants compiled libraries or a cluster stack that the module does not use).

    The rival's files are executed unchanged; only its parent packages are left out.  They lie in $RIVAL_FILES (an unpacked wheel that is not
    importable as a whole, and must not be: others look for it) or on the path.  bare: other packages of it to be entered without their __init__.
    forget: take the package out of sys.modules afterwards.
    """
    try:
        return importlib.import_module(module)
    except Exception:
        parents = module.split(".")[:-1]
        roots = [Path(root) for root in os.environ.get("RIVAL_FILES", "").split(os.pathsep) + sys.path if root]
        root = next((root for root in roots if (root / parents[0]).is_dir()), None)
        if root is None:
            raise ImportError(f"No module named '{parents[0]}'") from None
    before = set(sys.modules)
    for package in (parents, *(name.split(".") for name in bare)):
        for depth in range(1, len(package) + 1):
            empty = types.ModuleType(".".join(package[:depth]))
            empty.__path__ = [str(root.joinpath(*package[:depth]))]
            sys.modules.setdefault(empty.__name__, empty)
    found = importlib.import_module(module)
    for name in set(sys.modules) - before if forget else ():
        if name.split(".")[0] == parents[0]:
            del sys.modules[name]
    return found


def needs(case, *, cuda: bool = True, temperature: bool = True, dtypes: tuple[str, ...] = ("bf16", "fp32")) -> None:
    """NotMeasured unless the case suits a rival that runs on CUDA only or divides by no temperature."""
    if cuda and case.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotMeasured("CUDA only")
    if not temperature and case.shape.temperature != 1:
        raise NotMeasured("takes no temperature")
    if case.shape.dtype not in dtypes:
        raise NotMeasured(f"takes {' or '.join(dtypes)} only")


def megatron_group():
    """megatron-core's tensor-parallel group of one rank; its losses insist on one."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, create_gloo_process_groups=False)  # gloo wants a resolvable host name
    return parallel_state.get_tensor_model_parallel_group()


def from_nll(case: LogitsCase, objective: str, nll_of: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    """A rival that returns a differentiable nll [T]: token weights are put on top of it, as ms-swift and verl do."""

    def call(logits):
        loss = objective_sum(objective, -nll_of(logits), None, case.live)
        return {f"loss:{objective}": loss, f"dlogits:{objective}": torch.autograd.grad(loss, logits)[0]}

    return Run(call, in_place(case))
