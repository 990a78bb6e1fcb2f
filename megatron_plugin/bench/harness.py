"""Several contenders on one case: outputs compared with the truth first, then timed in turn, so that clocks and neighbours hit all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
MIB = 2**20
WARM = 200.0
"""Milliseconds from which a call (every contender has been called before) needs no warm-up."""
SPENT = "time budget spent"
"""Reason of a contender that was not tried."""
# relative error ||out - truth|| / ||truth||, by kind of output and dtype: wide enough for every honest implementation (a fast rival with a
# careless sum must be timed, its error is printed), narrow enough to catch a forgotten term.  bf16: rounding alone gives 1.7e-3 in a gradient;
# hidden-in, logits that pass through bf16 move every probability by about 1 %
TOLERANCE = {
    "bf16": {"logp": 1e-3, "entropy": 1e-3, "lse": 1e-3, "loss": 5e-2, "dlogits": 1e-2, "dhidden": 4e-2, "dweight": 4e-2},
    "fp32": {"logp": 1e-3, "entropy": 1e-3, "lse": 1e-3, "loss": 1e-3, "dlogits": 1e-3, "dhidden": 1e-3, "dweight": 1e-3},
}


class NotMeasured(Exception):
    """Why a contender cannot run here; printed in its row."""


class Work(NamedTuple):
    """The least a contender has to do: bytes through memory and floating-point operations.  Time over it gives GB/s and TFLOP/s."""

    bytes: int = 0
    flops: int = 0


class Run(NamedTuple):
    """One contender on one case."""

    call: Callable[[Any], Outputs]
    """Timed.  Returns its outputs under names the case knows the truth of."""
    prepare: Callable[[], Any] = lambda: None
    """Not timed, before every call; what it returns is handed to `call`."""


class Contender(NamedTuple):
    name: str
    """Part of the result files; targets.py refers to it."""
    build: Callable[[Any], Run]
    """Raises ImportError or NotMeasured where it cannot run."""
    says: str = ""
    """What it computes, where that differs from the claim."""
    slow_start: bool = False
    """Compiles or tunes for seconds: only run on shapes marked `rivals`."""
    work: Work | None = None
    """Of a ceiling; contenders share the case's."""


def percentile(values: list[float], q: float) -> float:
    """The q-quantile (0 to 1), linear between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


class CpuClock:
    """Wall clock around the call alone."""

    def time(self, run: Run) -> Callable[[], float]:
        state = run.prepare()
        start = time.perf_counter()
        outputs = run.call(state)
        ms = (time.perf_counter() - start) * 1e3
        del outputs
        return lambda: ms


class CudaClock:
    """Events around the call, the L2 cache overwritten before it."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 * MIB, dtype=torch.int8, device="cuda")

    def time(self, run: Run) -> Callable[[], float]:
        state = run.prepare()
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        outputs = run.call(state)
        end.record()
        del outputs
        return lambda: start.elapsed_time(end)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    """After a failure, out of memory above all."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def one_round(runs: dict[str, Run], clock: CpuClock | CudaClock, device: torch.device) -> dict[str, float | str]:
    """Every contender once, in turn: milliseconds, or why it failed."""
    pending: dict[str, Callable[[], float] | str] = {}
    for name, run in runs.items():
        try:
            pending[name] = clock.time(run)
        except Exception as error:
            pending[name] = reason_of(error)
        if isinstance(pending[name], str):  # not inside the except: the traceback holds on to tensors
            _free(device)
    _synchronize(device)
    gc.collect(0)  # collection is off while the clock runs; what a contender left in cycles is young
    return {name: value if isinstance(value, str) else value() for name, value in pending.items()}


def interleave(
    runs: dict[str, Run], clock: CpuClock | CudaClock, device: torch.device, *, seconds: float, least: int, most: int, deadline: float = math.inf
) -> dict[str, list[float] | str]:
    """Rounds of all contenders in turn, the first one to warm up those that take less than WARM ms.

    Every contender has the same share of `seconds`, but between `least` and `most` calls: slow ones leave the rounds earlier.  One that
    fails leaves with its reason.  After `deadline` (time.monotonic) no round begins but the first counted one.
    """
    results: dict[str, list[float] | str] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        first = one_round(runs, clock, device)
        results |= {name: value if isinstance(value, str) else [value] * (value >= WARM) for name, value in first.items()}
        share = seconds * 1e3 / len(first) if first else 0
        counts = {name: max(least, min(most, int(share / ms))) for name, ms in first.items() if not isinstance(ms, str)}
        left = {name: count - len(results[name]) for name, count in counts.items() if count > len(results[name])}
        while left:
            for name, value in one_round({name: runs[name] for name in left}, clock, device).items():
                if isinstance(value, str):
                    results[name], left[name] = value, 0
                else:
                    results[name].append(value)
                    left[name] -= 1
            late = time.monotonic() > deadline
            left = {name: count for name, count in left.items() if count and not late}
    finally:
        gc.enable()
    return results


def relative_error(output: Tensor, truth: Tensor) -> float:
    """||output - truth|| / ||truth|| in fp64; NaN or infinite where the output is."""
    output, truth = output.detach().double(), truth.double()
    if output.shape != truth.shape:
        raise ValueError(f"got an output of shape {list(output.shape)}, expected {list(truth.shape)}")
    norm = truth.norm()
    return float((output - truth).norm() / (norm if norm > 0 else 1.0))


def check(case, outputs: Outputs) -> tuple[dict[str, float], str]:
    """(relative error of every output, why it is refused or ''): wrong outputs are never timed."""
    errors = {}
    for name, output in outputs.items():
        errors[name] = relative_error(case.pick(name, output), case.expected(name))
        if not bool(torch.isfinite(output).all()):
            errors[name] = float("inf")
    bounds = TOLERANCE[case.shape.dtype]
    wrong = [f"{name} {error:.1e} > {bounds[name.partition(':')[0]]:.0e}" for name, error in errors.items() if not error <= bounds[name.partition(":")[0]]]
    return errors, "refused, wrong output: " + ", ".join(wrong) if wrong else ""


def reason_of(error: Exception) -> str:
    """Why a contender has no numbers, in one line."""
    if isinstance(error, NotMeasured):
        return str(error)
    if isinstance(error, ImportError):
        return f"not importable ({str(error).splitlines()[0]})"
    first = next(iter(str(error).splitlines()), "")
    return f"failed: {type(error).__name__}: {first[:160]}"


def _poison(case) -> None:
    """Leave NaN in the memory that the next outputs are allocated from: an element nobody wrote must not hold a rival's right answer."""
    if case.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        for size in case.output_bytes():
            if free > 3 * size:
                torch.empty(size // 2, dtype=torch.int16, device="cuda").fill_(-1)


def _try(case, contender: Contender, refuse: bool) -> tuple[Run | None, dict[str, Any]]:
    """Build, run once and compare, run again for peak memory."""
    facts: dict[str, Any] = {"errors": {}, "peak_mib": None, "reason": ""}
    cuda = case.device.type == "cuda"
    try:
        if contender.slow_start and not case.shape.rivals:
            raise NotMeasured("not run at this shape (compiles for seconds)")
        run = contender.build(case)
        base = torch.cuda.memory_allocated() if cuda else 0  # inputs, and what was there before the step (main_grad)
        _poison(case)
        outputs = run.call(run.prepare())
        held = torch.cuda.memory_allocated() if cuda else 0
        facts["errors"], wrong = check(case, outputs)
        base += torch.cuda.memory_allocated() - held if cuda else 0  # the first comparison computes the truth and keeps it
        del outputs
        if wrong and refuse:
            facts["reason"] = wrong
            return None, facts
        if cuda:  # a second call: what compiling and tuning allocated is gone; what the contender keeps is counted
            state = run.prepare()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            outputs = run.call(state)
            torch.cuda.synchronize()
            facts["peak_mib"] = (torch.cuda.max_memory_allocated() - base) / MIB
            del outputs, state
        return run, facts
    except Exception as error:
        facts["reason"] = reason_of(error)
        return None, facts
    finally:
        if facts["reason"]:
            _free(case.device)


def compare(case, contenders: list[Contender], work: Work, *, seconds: float = 5.0, least: int = 3, most: int = 50, refuse: bool = True,
            deadline: float = math.inf) -> list[dict[str, Any]]:
    """One row per contender, losses and absences included; shares are of the ceilings timed in the same rounds.

    refuse: a wrong output is not timed; False only where the error is what is measured.  deadline: time.monotonic() after which no further
    contender is tried, so the first in the list are measured in any case.
    """
    runs, facts = {}, {}
    for contender in contenders:
        if time.monotonic() > deadline and runs:
            facts[contender.name] = {"errors": {}, "peak_mib": None, "reason": SPENT}
            continue
        run, facts[contender.name] = _try(case, contender, refuse)
        if run:
            runs[contender.name] = run
    clock = CudaClock() if case.device.type == "cuda" else CpuClock()
    times = interleave(runs, clock, case.device, seconds=seconds, least=least, most=most, deadline=deadline)
    return finish_rows(case.shape, contenders, facts, times, work)


def finish_rows(shape, contenders: list[Contender], facts: dict, times: dict[str, list[float] | str], work: Work) -> list[dict[str, Any]]:
    """Medians, rates and shares from the raw times."""
    rows = []
    for contender in contenders:
        row = {"shape": str(shape), "T": shape.T, "H": shape.H, "V": shape.V, "dtype": shape.dtype, "held_out": shape.held_out,
               "contender": contender.name, "says": contender.says, "ms": None, **facts[contender.name]}  # fmt: skip
        measured = times.get(contender.name)
        if isinstance(measured, str):
            row["reason"] = measured
        elif measured:
            p20, p50, p80 = (percentile(measured, q) for q in (0.2, 0.5, 0.8))
            own = contender.work or work
            row |= {"ms": p50, "p20": p20, "p80": p80, "rounds": len(measured), "gb_s": own.bytes / p50 / 1e6, "tflop_s": own.flops / p50 / 1e9}
        rows.append(row)
    for kind, rate in (("copy", "gb_s"), ("read", "gb_s"), ("gemm", "tflop_s")):
        best = max((row[rate] for row in rows if row["contender"].startswith(f"ceiling.{kind}") and row["ms"]), default=0)
        for row in rows:
            if best and row["ms"]:
                row[f"share_{kind}"] = row[rate] / best
    return rows
