"""Gates on the machine code of the cluster kernel, the very objects that training would load; needs nvcc, no GPU."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
import triton

from megatron_plugin.kernels import cluster, weighting
from megatron_plugin.kernels.twin_cuda import translate

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TWINS = {"idft": (weighting.idft, 1), "grpo": (weighting.grpo, 2)}  # the longest: one by statistics, one by inputs
THREADS, UNROLL = 256, 4  # of csrc/cluster_loss.cu
VARIANTS = [(dtype, twin) for dtype in cluster.ELEMENTS for twin in TWINS]


def _has_nvcc() -> bool:
    try:
        return shutil.which(cluster._nvcc()) is not None
    except RuntimeError:
        return False


pytestmark = pytest.mark.skipif(not _has_nvcc(), reason="needs nvcc")


@cache
def _facts(dtype: torch.dtype, twin: str) -> dict:
    built = cluster.library(dtype, translate(*TWINS[twin]))._library._name
    run = lambda flag: subprocess.run([CUOBJDUMP, flag, built], capture_output=True, text=True, check=True).stdout  # noqa: E731
    registers, stack, static = map(int, re.search(r"Function cluster_loss_kernel:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", run("-res-usage")).groups())
    text = run("-sass")
    code = [(int(a, 16), op.strip()) for a, op in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)]
    elements = UNROLL * 16 // dtype.itemsize
    hot = []
    for address, op in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", op)
        if target and int(target[1], 16) < address:
            body = [o for a, o in code if int(target[1], 16) <= a <= address]
            # the loops over whole tiles; the loop over rows, around them, has both
            if sum("MUFU.EX2" in o for o in body) in (elements, elements + 1) and sum("LDS.128" in o for o in body) == UNROLL:
                hot.append(body)
    hot = [body for body in hot if any("SYNCS" in o for o in body)]  # with the wait for a tile, or its refill
    return dict(registers=registers, stack=stack, static=static, arch=re.search(r"arch = (\w+)", text)[1], ops=[op for _, op in code], hot=hot, elements=elements)


def _count(pattern: str, ops: list[str]) -> int:
    return sum(bool(re.search(pattern, op)) for op in ops)


@pytest.mark.parametrize("dtype, twin", VARIANTS, ids=str)
def test_nothing_spills_and_three_blocks_fit_the_registers(dtype, twin):
    facts = _facts(dtype, twin)
    assert facts["arch"] == "sm_90a"
    assert facts["stack"] == 0 and _count(r"\b(LDL|STL)\b", facts["ops"]) == 0
    assert 3 * THREADS * -(-facts["registers"] // 8) * 8 <= 65536
    assert facts["static"] <= 1024  # what the system takes; Plan counts it with the dynamic part


@pytest.mark.parametrize("dtype, twin", VARIANTS, ids=str)
def test_the_copy_engine_feeds_the_blocks_of_a_cluster(dtype, twin):
    ops = _facts(dtype, twin)["ops"]
    assert _count(r"UBLKCP\.S\.G", ops) and _count(r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT", ops)
    assert _count("UCGABAR_ARV", ops) and _count("UCGABAR_WAIT", ops)
    assert _count(r"LDG\.E[\w.]*\.128", ops) == 0  # no logit comes another way than by bulk copy, or singly at the edges of a row


@pytest.mark.parametrize("dtype, twin", VARIANTS, ids=str)
def test_the_two_hot_loops(dtype, twin):
    """H200 at full bandwidth leaves 26 issue slots and 3.3 exponentials per bf16 logit read and written.  Measured 7.1 + 8.1, fp32 7.4 + 8.3."""
    facts = _facts(dtype, twin)
    n = facts["elements"]
    assert len(facts["hot"]) == 2
    forward, backward = facts["hot"]
    assert _count(r"STG\.E\.128", forward) == 0 and _count(r"STG\.E\.128", backward) == UNROLL
    assert _count("MUFU.EX2", forward) == n + 1 and _count("MUFU.EX2", backward) == n  # + 1: the rescaling of 4 vectors
    assert len(forward) <= 8 * n and len(backward) <= 9 * n
    for body in (forward, backward):
        assert _count(r"FMNMX\.NAN", body) == n  # the clamp that keeps NaN
        assert _count(r"\b(LD|ST)\.E", body) == 0 and _count(r"LDG\.", body) == 0  # no generic access, no second read
