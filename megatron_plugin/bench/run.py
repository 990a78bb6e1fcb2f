"""`megatron-plugin bench`: our ops beside eager PyTorch and torch.compile, on this machine, at the size asked for.

    megatron-plugin bench --tokens 2048 --vocab 151936 --dtype bf16
    megatron-plugin bench --ops linear_token_loss --hidden 4096

Every contender's outputs are compared with the truth first; a wrong one is not timed.  Then they are called in turn, and the medians are printed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_plugin.bench import ours, ours_linear
from megatron_plugin.bench.cases import linear_case, logits_case
from megatron_plugin.bench.harness import SPENT, Contender, Work, compare
from megatron_plugin.bench.machine import environment, keep_freed_memory
from megatron_plugin.bench.pytorch import expression, full_logits, stats_in_one_expression, stats_log_softmax, stats_lse
from megatron_plugin.bench.shape import ITEMSIZE, Shape
from megatron_plugin.config import ConfigError

__all__ = ["OPS", "OpsError", "Options", "bench"]

OBJECTIVE = "dft+entropy"
SIZES = {"cpu": (512, 32768, 512, "fp32"), "cuda": (8192, 151936, 4096, "bf16")}
"""Tokens, vocabulary, hidden size and dtype by default."""
QUICK = (64, 1000, 64, "fp32")
SHARE = 0.75
"""Of the time limit, after which no contender is begun: one that compiles cannot be stopped."""


class OpsError(RuntimeError):
    """An op of ours failed here, or is wrong."""

    exit_code = 1


@dataclass(frozen=True)
class Options:
    """What is asked; None: by device."""

    ops: tuple[str, ...]
    device: str
    tokens: int | None = None
    vocab: int | None = None
    hidden: int | None = None
    dtype: str | None = None
    limit_s: float = 55.0
    """Seconds all of it may take."""
    compile: bool = True
    quick: bool = False


class Op(NamedTuple):
    """What is called, beside what, and the least work of it."""

    case: Callable[[Shape, str], Any]
    contenders: Callable[[bool], list[Contender]]
    work: Callable[[Shape], Work]


def _stats(compiled: bool) -> list[Contender]:
    rivals = [Contender("eager", stats_in_one_expression(stats_log_softmax), "log_softmax")]
    return [Contender("ours", ours.stats()), *rivals, *[Contender("torch.compile", stats_in_one_expression(stats_lse, True))] * compiled]


def _token_loss(compiled: bool) -> list[Contender]:
    rivals = [Contender("eager", expression(OBJECTIVE, stats_log_softmax), "log_softmax, autograd")]
    mine = [Contender("ours", ours.one_pass(OBJECTIVE), "one pass"), Contender("ours, two-pass", ours.two_pass(OBJECTIVE), "token_stats")]
    return [*mine, *rivals, *[Contender("torch.compile", expression(OBJECTIVE, stats_lse, True))] * compiled]


def _linear(compiled: bool) -> list[Contender]:
    mine = [Contender("ours", ours_linear.one_pass(OBJECTIVE), "one pass"), Contender("ours, two-pass", ours_linear.two_pass(OBJECTIVE), "linear_token_stats")]
    rivals = [Contender("eager", full_logits(OBJECTIVE, stats_log_softmax), "full logits, autograd")]
    return [*mine, *rivals, *[Contender("torch.compile", full_logits(OBJECTIVE, stats_lse, True), "full logits")] * compiled]


OPS: dict[str, Op] = {
    "stats": Op(logits_case, _stats, lambda shape: Work(bytes=shape.logits_bytes)),
    "token_loss": Op(logits_case, _token_loss, lambda shape: Work(bytes=2 * shape.logits_bytes)),
    "linear_token_loss": Op(linear_case, _linear, lambda shape: Work(flops=shape.gemm_flops)),
}
"""token_stats without gradient; a weighted loss with entropy from logits, forward and backward; the same from hidden states and the head's weight."""


def bench(options: Options, out: Path | None) -> list[dict[str, Any]]:
    """Measures, prints a table, and writes rows and environment as JSON.  ConfigError for a device that is not there, or too little memory;
    OpsError, once that is written, where a row of ours has a reason (with time enough: that there was none is nothing against it)."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("got cuda, expected cpu: torch finds no GPU here; `megatron-plugin doctor` says more", "--device")
    if options.device == "cpu":
        keep_freed_memory()
    header, began, rows = environment(options.device), time.monotonic(), []
    for done, name in enumerate(options.ops, 1):
        op, shape = OPS[name], _shape(options, hidden=name == "linear_token_loss")
        torch.manual_seed(shape.seed)
        deadline = began + SHARE * options.limit_s * done / len(options.ops)
        limits: dict[str, Any] = dict(seconds=0.0, least=2) if options.quick else dict(seconds=0.15 * options.limit_s / len(options.ops))
        contenders = op.contenders(options.compile and not options.quick)
        rows += [{"op": name, **row} for row in compare(op.case(shape, options.device), contenders, op.work(shape), deadline=deadline, **limits)]
        if options.compile:
            torch._dynamo.reset()
    header["seconds"] = round(time.monotonic() - began, 1)
    _print(rows, header)
    wrong = [row for row in rows if row["contender"].startswith("ours") and row["reason"]]
    if options.quick and not wrong:
        print("--quick: the ops run and are right here; two calls of so small a size say nothing about speed")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"environment": header, "options": asdict(options), "rows": rows}, indent=1) + "\n")
        print(out)
    if failed := [f"{row['op']}, {row['contender']}: {row['reason']}" for row in wrong if row["reason"] != SPENT]:
        raise OpsError(f"got {'; '.join(failed)}; expected the truth: `megatron-plugin doctor` says what is broken here")
    return rows


def _shape(options: Options, *, hidden: bool) -> Shape:
    tokens, vocab, width, dtype = QUICK if options.quick else SIZES[options.device]
    tokens, vocab, width, dtype = options.tokens or tokens, options.vocab or vocab, options.hidden or width, options.dtype or dtype
    need = 8 * tokens * vocab * ITEMSIZE[dtype]  # eager's temporaries in fp32 beside the logits and their copy
    have = torch.cuda.mem_get_info()[0] if options.device == "cuda" else _free_memory()
    if have and need > have:
        raise ConfigError(f"got {tokens} x {vocab} in {dtype}, which takes about {need / 2**30:.1f} GiB beside the eager contender, expected at most "
                          f"{have / 2**30:.1f} GiB; take fewer --tokens", "--tokens")  # fmt: skip
    return Shape(tokens, vocab, width if hidden else 0, dtype)


def _free_memory() -> int:
    """Bytes, of a Linux machine; 0 where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def _print(rows: list[dict[str, Any]], header: dict[str, Any]) -> None:
    machine = header.get("gpu") or f"{header['cpu']}, {header['threads']} of {header['cores']} cores, load {header['load_before']}"
    print(f"{machine}; torch {header['versions'].get('torch', '?')}; {OBJECTIVE}; medians of rounds in turn, {header['seconds']} s")
    cells = [_cells(row, rows) for row in rows]
    headings = ("op", "shape", "contender", "ms", "p20 to p80", "least work at", "x ours", "error")
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in (headings, *cells):
            print("  ".join(line))
        return
    table = Table()
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < 3 else "right")
    for line in cells:
        table.add_row(*line)
    Console(width=140).print(table)


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    name = (row["op"], row["shape"], row["contender"])
    if row["ms"] is None:
        return (*name, "not measured", row["reason"], "", "", "")
    mine = next(r["ms"] for r in rows if r["op"] == row["op"] and r["contender"] == "ours")
    rate = f"{row['tflop_s']:.3g} TFLOP/s" if row["op"] == "linear_token_loss" else f"{row['gb_s']:.3g} GB/s"
    ratio = "" if row["contender"].startswith("ours") or not mine else f"{row['ms'] / mine:.2f}"
    return (*name, f"{row['ms']:.3g}", f"{row['p20']:.3g} to {row['p80']:.3g}", rate, ratio, f"{max(row['errors'].values()):.0e}")
