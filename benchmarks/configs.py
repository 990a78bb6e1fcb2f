"""Which block, warps, stages and registers each Triton kernel is fastest with, per shape.  For choosing constants, not a claim.

Sweeps the launch that training uses (its KernelCall, with other options); a configuration whose result differs from the default's is not
timed.  Compilation runs in several processes first, since all of them share Triton's cache on disk.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import torch

from benchmarks import shapes
from benchmarks._ceilings import memory_ceilings
from benchmarks._machine import ROOT
from benchmarks._report import Report
from megatron_plugin.bench.cases import IGNORE, LogitsCase, coefficients, logits_case
from megatron_plugin.bench.harness import Contender, NotMeasured, Run, Work, relative_error
from megatron_plugin.bench.ours import bound

PER_THREAD = (8, 64)
"""Fewest and most elements of a block per thread: fewer idle, more spill."""
SWEEPS = {
    "stats": dict(BLOCK=(2048, 4096, 8192, 16384), num_warps=(4, 8, 16), STAGES=(2, 3, 4)),
    "grad": dict(BLOCK=(2048, 4096, 8192), num_warps=(4, 8, 16), STAGES=(2, 3, 4)),
    "loss": dict(BLOCK=(4096, 8192, 16384, 32768), num_warps=(8, 16, 32), STAGES=(2, 3), maxnreg=(64, 128, None)),
}
PASSES = {"stats": 1, "grad": 2, "loss": 3}
"""Times the logits cross memory."""


def options(kernel: str) -> list[dict]:
    """All launches worth trying."""
    grid = SWEEPS[kernel]
    every = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    low, high = PER_THREAD
    fits = lambda o: low <= o["BLOCK"] / (32 * o["num_warps"]) <= high and o["num_warps"] * 32 * (o.get("maxnreg") or 0) <= 65536  # noqa: E731
    return [{name: value for name, value in o.items() if value is not None} for o in every if fits(o)]


def _call(kernel: str, case: LogitsCase):
    """(the launch as training makes it, the tensor it fills)."""
    from megatron_plugin import TokenInputs
    from megatron_plugin.kernels.grad import grad_call
    from megatron_plugin.kernels.layout import Shard
    from megatron_plugin.kernels.loss import loss_call
    from megatron_plugin.kernels.partials import finish_rows
    from megatron_plugin.kernels.stats import stats_call
    from megatron_plugin.losses.objective import objective_of

    shard = Shard(0, case.shape.V, IGNORE, case.shape.temperature)
    logits, labels = case.logits, case.labels
    if kernel == "stats":
        return stats_call(logits, labels, shard)
    if kernel == "loss":
        objective, _ = objective_of(bound("dft+entropy").for_vocabulary(case.shape.V), TokenInputs())
        return loss_call(logits, logits, labels, shard, objective)[0], logits
    call, partials = stats_call(case.original, labels, shard)
    call.launch()
    logp, *_, rows = finish_rows(partials, labels, shard, torch.float32)
    a, b = coefficients("dft+entropy", logp, case.live)
    grads = torch.stack((a, b, torch.zeros_like(a)), -1).float()
    return grad_call(logits, logits, labels, rows.float(), grads, shard), logits


def contender(kernel: str, chosen: dict | None) -> Contender:
    def build(case: LogitsCase) -> Run:
        call, out = _call(kernel, case)
        if chosen:
            tried = {name: value for name, value in call.options.items() if name != "maxnreg"} | chosen
            if tried == call.options:
                raise NotMeasured("the default")
            case.restore()
            call.launch()
            rows = torch.linspace(0, case.shape.T - 1, 64, device=case.device).long()
            expected = out[rows].clone()
            call = replace(call, options=tried)
            case.restore()
            call.launch()
            bound_on = 1e-5 if kernel == "stats" else {"bf16": 1e-3, "fp32": 1e-5}[case.shape.dtype]
            if (error := relative_error(out[rows], expected)) > bound_on:
                raise NotMeasured(f"another result than the default's: {error:.0e}")

        def run(_):
            call.launch()
            return {}

        return Run(run, case.restore)

    name = " ".join(f"{key}={value}" for key, value in chosen.items()) if chosen else "default"
    return Contender(f"{'ours: ' if not chosen else ''}{kernel} {name}", build)


def warm(part: int, parts: int) -> None:
    """Compile every parts-th configuration into Triton's cache."""
    case = logits_case(shapes.Shape(16, 151936), "cuda")
    work = [(kernel, chosen) for kernel in SWEEPS for chosen in options(kernel)]
    for kernel, chosen in work[part::parts]:
        call, _ = _call(kernel, case)
        try:
            replace(call, options={k: v for k, v in call.options.items() if k != "maxnreg"} | chosen).launch()
        except Exception as error:  # found again, and printed in its row, when it is timed
            print(kernel, chosen, error, file=sys.stderr)


def main() -> None:
    if "--warm" in sys.argv:
        warm(*(int(x) for x in sys.argv[-2:]))
        return
    report = Report("configs", __doc__)
    if report.device == "cpu":
        report.add([{"shape": "none", "held_out": False, "contender": "all", "ms": None, "reason": "Triton kernels run on CUDA only"}])
        return
    parts = min(12, os.cpu_count())
    children = [subprocess.Popen([sys.executable, "-m", "benchmarks.configs", "--warm", str(i), str(parts)], cwd=ROOT) for i in range(parts)]
    for child in children:
        child.wait()
    for shape in report.shapes(shapes.CONFIGS):
        case = logits_case(shape, report.device)
        for kernel, passes in PASSES.items():
            mine = [contender(kernel, None), *(contender(kernel, chosen) for chosen in options(kernel))]
            limits = {"seconds": report.options.seconds, "least": 5, "most": 20}
            rows = report.compare(case, [*memory_ceilings(shape)[:1], *mine], Work(bytes=passes * shape.logits_bytes), **limits)
            timed = sorted((row["ms"], row["contender"]) for row in rows if row["ms"] and not row["contender"].startswith("ceiling"))
            print(f"fastest {kernel} at {shape}: " + ", ".join(f"{name} {ms:.3f} ms" for ms, name in timed[:3]), flush=True)


if __name__ == "__main__":
    main()
