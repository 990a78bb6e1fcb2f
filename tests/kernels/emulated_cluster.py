"""The cluster kernel on the CPU: csrc/cluster_loss.cu compiled by g++ over emulated_hopper.h, in the place of the GPU's.  Needs no CUDA."""

import ctypes
import hashlib
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from megatron_plugin.kernels import build, cluster

HERE = Path(__file__).parent
FLAGS = ("-O1", "-std=c++17", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-shared", "-fPIC")
LANDINGS = {"at once": 0, "sometime": 1, "as late as possible": 2}


@cache
def library(dtype: torch.dtype, twin: str, csrc: Path = build.CSRC) -> cluster.Library:
    """As cluster.library, for CPU tensors."""
    own = hashlib.sha256(b"".join((folder / name).read_bytes() for folder, name in (
        (HERE, "emulated_hopper.h"), (csrc, "cluster_loss.cu"), (csrc, "cluster_row.h")))).hexdigest()  # fmt: skip
    flags = (*FLAGS, f"-DELEMENT={cluster.ELEMENTS[dtype]}", f"-I{csrc}", f"-I{HERE}")
    loaded = build.load(str(HERE / "emulated_cluster.cpp"), flags, header=f"// {own}\n{twin}")
    emulated = cluster.Library(loaded)
    emulated.c = loaded
    setup(emulated)
    return emulated


def setup(emulated: cluster.Library, *, seed: int = 1, landing: str = "sometime", clusters: int = 2) -> None:
    """Order of threads, landing of copies and number of persistent clusters in the launches to come."""
    emulated.c.emulator_setup(ctypes.c_uint64(seed), LANDINGS[landing], clusters)
    emulated._clusters.clear()


def counts(emulated: cluster.Library, elements: int, elements_out: int) -> tuple[np.ndarray, np.ndarray]:
    """(times read, times written) of every element between the first and the last of the logits and the gradient in the last launch."""
    reads, writes = np.zeros(elements, np.uint8), np.zeros(elements_out, np.uint8)
    emulated.c.emulator_counts(*(ctypes.c_void_p(x.ctypes.data) for x in (reads, writes)))
    return reads, writes


@contextmanager
def no_gpu(monkeypatch):
    """use_backend("cluster") takes CPU tensors and runs the emulated kernel."""
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "library", library)
        patch.setattr(cluster, "_check_device", lambda logits: None)
        patch.setattr(cluster, "_stream", lambda: 0)
        yield
