"""Peak memory on a CPU beyond the inputs and the returned gradients, one process per contender.

The process runs the contender on a small case, whose outputs are compared (those of the full one are in the timing benchmarks), resets the
kernel's high-water mark and runs it.  One that compiles runs twice, the mark reset between: what compiling needs for a moment is not counted.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import rivals, rivals_linear, shapes
from benchmarks._machine import ROOT
from benchmarks._report import Report
from megatron_plugin.bench import ours, ours_linear
from megatron_plugin.bench.cases import linear_case, logits_case
from megatron_plugin.bench.harness import MIB, Contender, check, reason_of

MEASURED = {  # which contenders, by (hidden-in, dtype)
    (True, "bf16"): ("ours.linear_token_loss", "ours.linear_token_loss main_grad", "ours.linear_token_stats", "eager", "compile.lse",
                     "torch.linear_cross_entropy"),
    (True, "fp32"): ("ours.linear_token_loss", "ours.linear_token_loss main_grad", "eager", "torch.linear_cross_entropy"),
    (False, "bf16"): ("ours.token_loss", "ours.token_stats", "eager", "F.cross_entropy"),
}  # fmt: skip


def contenders(shape: shapes.Shape) -> dict[str, Contender]:
    if shape.H:
        every = ours_linear.CONTENDERS + rivals_linear.LINEAR
    else:
        mine = [Contender("ours.token_loss", ours.one_pass("dft+entropy")), Contender("ours.token_stats", ours.two_pass("dft+entropy"))]
        every = mine + rivals.FORWARD_BACKWARD
    by_name = {contender.name: contender for contender in every}
    return {name: by_name[name] for name in MEASURED[bool(shape.H), shape.dtype]}


def _status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _make(shape: shapes.Shape):
    return (linear_case if shape.H else logits_case)(shape, "cpu")


def child(name: str, shape: shapes.Shape) -> dict:
    """In a process of its own: extra peak in MiB, and the errors of what was returned."""
    contender = contenders(shape)[name]
    small = _make(replace(shape, T=33, V=500))
    warm = contender.build(small)
    errors, reason = check(small, warm.call(warm.prepare()))  # loads libraries and thread pools too
    if reason:
        return {"errors": errors, "reason": reason, "peak_mib": None}
    case = _make(shape)
    run = contender.build(case)
    base = _status("VmRSS")
    if contender.slow_start:
        torch._dynamo.reset()
        run.call(run.prepare())
    state = run.prepare()
    there = {x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    outputs = run.call(state)
    peak = _status("VmHWM")
    returned = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in outputs.values()}
    new = sum(size for pointer, size in returned.items() if pointer not in there)
    return {"errors": errors, "reason": "", "peak_mib": max(0.0, (peak - base - new) / MIB), "returned_mib": new / MIB}


def measure(name: str, shape: shapes.Shape) -> dict:
    command = [sys.executable, "-m", "benchmarks.cpu_memory", "--child", name, "--shape", json.dumps(asdict(shape))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        return {"errors": {}, "peak_mib": None, "reason": f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:160]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--child")
        parser.add_argument("--shape", type=lambda text: shapes.Shape(**json.loads(text)))
        arguments = parser.parse_args()
        try:
            facts = child(arguments.child, arguments.shape)
        except Exception as error:
            facts = {"errors": {}, "peak_mib": None, "reason": reason_of(error)}
        print(json.dumps(facts))
        return
    report = Report("cpu_memory", __doc__)
    if report.device != "cpu":
        raise SystemExit("cpu_memory is for --device cpu; on a GPU every benchmark reports its peak")
    frozen = [*(s for s in shapes.LINEAR["cpu"] if not s.held_out), next(s for s in shapes.LOGITS["cpu"] if s.dtype == "bf16")]
    for shape in list(report.shapes({"cpu": frozen}))[: 1 if report.options.tiny else None]:
        chosen = contenders(shape)
        names = list(chosen)[: 4 if report.options.tiny else None : 3 if report.options.tiny else 1]
        with ThreadPoolExecutor(2) as pool:  # peaks do not mind company
            found = pool.map(lambda name, shape=shape: measure(name, shape), names)
            for name, facts in zip(names, found, strict=True):
                row = {"shape": str(shape), "T": shape.T, "H": shape.H, "V": shape.V, "dtype": shape.dtype, "held_out": False, "contender": name}
                report.add([row | {"says": chosen[name].says, "ms": None} | facts])


if __name__ == "__main__":
    main()
