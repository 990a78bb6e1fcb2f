"""The numbers this project has promised, each judged from the rows alone.  A row that did not run is 'not measured', never met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Rows = dict[str, dict]
"""The rows of one benchmark at one shape, by contender."""


def _measured(rows: Rows, name: str, key: str = "ms") -> list[float]:
    """Values of a contender, or of all whose name begins with `name` where that ends in a dot."""
    match = (lambda c: c.startswith(name)) if name.endswith(".") else (lambda c: c == name)
    return [row[key] for contender, row in rows.items() if match(contender) and row.get(key) is not None]


def faster(ours: str, *rivals: str) -> Callable[[Rows], float | None]:
    """How many times faster ours is than the fastest of the rivals."""

    def value(rows: Rows) -> float | None:
        mine, theirs = _measured(rows, ours), [ms for rival in rivals for ms in _measured(rows, rival)]
        return min(theirs) / mine[0] if mine and theirs else None

    value.needs = (ours, *rivals)
    return value


def ratio(ours: str, base: str, key: str = "ms") -> Callable[[Rows], float | None]:
    """Ours over the base."""

    def value(rows: Rows) -> float | None:
        mine, theirs = _measured(rows, ours, key), _measured(rows, base, key)
        return mine[0] / theirs[0] if mine and theirs else None

    value.needs = (ours, base)
    return value


def share(ours: str, of: str) -> Callable[[Rows], float | None]:
    """Ours as a share of a ceiling timed in the same rounds."""

    def value(rows: Rows) -> float | None:
        mine = _measured(rows, ours, f"share_{of}")
        return mine[0] if mine else None

    value.needs = (ours,)
    return value


def over_allowed(ours: str) -> Callable[[Rows], float | None]:
    """Peak memory over what the target allows at this shape."""

    def value(rows: Rows) -> float | None:
        mine, allowed = _measured(rows, ours, "peak_mib"), _measured(rows, ours, "allowed_mib")
        return mine[0] / allowed[0] if mine and allowed else None

    value.needs = (ours,)
    return value


@dataclass(frozen=True)
class Target:
    op: str
    text: str
    device: str
    benchmark: str
    value: Callable[[Rows], float | None]
    need: float
    at_most: bool = False
    where: Callable[[dict], bool] = lambda row: True
    """Which shapes it speaks of."""

    def holds(self, value: float) -> bool:
        return value <= self.need if self.at_most else value >= self.need


def _row_512(row: dict) -> bool:
    return row["held_out"] or row["T"] == 512


ONE_PASS, L1 = "ours.linear_token_loss", "ours.token_loss"
TARGETS = [
    Target("CPU stats forward", ">= 2.5x torch.compile", "cpu", "stats_forward", faster("ours", "compile.log_softmax", "compile.lse"), 2.5, where=_row_512),
    Target("CPU stats forward", ">= 10x eager", "cpu", "stats_forward", faster("ours", "eager"), 10, where=_row_512),
    Target("CPU stats forward, fp32", ">= 60 % of read bandwidth", "cpu", "stats_forward", share("ours", "read"), 0.6,
           where=lambda row: _row_512(row) and row["dtype"] == "fp32"),
    Target("CPU grad in place", ">= 2x torch.compile", "cpu", "grad_in_place", faster("ours", "compile."), 2, where=_row_512),
    Target("CPU linear_token_loss", "<= 1.15x its 3 GEMMs", "cpu", "linear_loss", ratio(ONE_PASS, "ceiling.gemm"), 1.15, at_most=True),
    Target("CPU linear_token_loss", "extra memory <= 1/8 of eager's", "cpu", "cpu_memory", ratio(ONE_PASS, "eager", "peak_mib"), 1 / 8, at_most=True,
           where=lambda row: row["H"] > 0),
    Target("stats forward", ">= 88 % of copy bandwidth", "cuda", "stats_forward", share("ours", "copy"), 0.88),
    Target("L1 fwd+bwd with entropy", ">= 3.2x Liger vocab-parallel", "cuda", "loss_forward_backward", faster(L1, "liger.vocab_parallel"), 3.2),
    Target("L1 fwd+bwd with entropy", ">= 7x mcore fused", "cuda", "loss_forward_backward", faster(L1, "mcore.fused"), 7),
    Target("L1 fwd+bwd with entropy", ">= 8x mcore CE + separate entropy", "cuda", "loss_forward_backward", faster(L1, "mcore+entropy"), 8),
    Target("L1 fwd+bwd with entropy", ">= 1.0x TE's newest", "cuda", "loss_forward_backward", faster(L1, "te"), 1.0),
    Target("L2 one-pass, DFT + entropy", ">= 92 % of the 3 GEMMs' rate", "cuda", "linear_loss", share(ONE_PASS, "gemm"), 0.92),
    Target("L2 one-pass, CHORD + entropy", ">= 92 % of the 3 GEMMs' rate", "cuda", "linear_loss", share(f"{ONE_PASS} chord_phi", "gemm"), 0.92),
    Target("L2 one-pass", ">= 1.8x verl's kernel class", "cuda", "linear_loss", faster(ONE_PASS, "verl"), 1.8),
    Target("L2 one-pass", ">= 1.5x Liger FLCE + token scaling", "cuda", "linear_loss",
           faster(ONE_PASS, "liger.flce", "liger.flce fp32 dW, larger chunk"), 1.5),
    Target("L2 one-pass", ">= 1.5x torch's linear_cross_entropy", "cuda", "linear_loss", faster(ONE_PASS, "torch.linear_cross_entropy"), 1.5),
    Target("L2 peak extra memory", "<= chunk + dX (with main_grad), to 2 %: a few numbers per token", "cuda", "linear_loss",
           over_allowed(f"{ONE_PASS} main_grad"), 1.02, at_most=True),
]  # fmt: skip


def by_shape(rows: list[dict], benchmark: str) -> dict[str, Rows]:
    """{shape: {contender: row}} in the order of the rows."""
    shapes: dict[str, Rows] = {}
    for row in rows:
        if row["benchmark"] == benchmark:
            shapes.setdefault(row["shape"], {})[row["contender"]] = row
    return shapes


def _asked(target: Target, shapes: dict[str, Rows], held_out: bool) -> dict[str, Rows]:
    """The shapes that a target speaks of."""
    first = {shape: next(iter(rows.values())) for shape, rows in shapes.items()}
    return {s: rows for s, rows in shapes.items() if first[s]["held_out"] == held_out and "T" in first[s] and target.where(first[s])}


def _worst(target: Target, shapes: dict[str, Rows], held_out: bool) -> tuple[float, str, int] | None:
    """(worst value, its shape, how many shapes have a value)."""
    values = [(value, s) for s, rows in _asked(target, shapes, held_out).items() if (value := target.value(rows)) is not None]
    if not values:
        return None
    return *(max if target.at_most else min)(values), len(values)


def _why_not(target: Target, shapes: dict[str, Rows]) -> str:
    for rows in shapes.values():
        for name in target.value.needs:
            for contender, row in rows.items():
                if (contender == name or name.endswith(".") and contender.startswith(name)) and row.get("reason"):
                    return row["reason"]
    return "no such row"


def verdicts(rows: list[dict], device: str, *, tiny: bool = False) -> list[dict]:
    """One line per target of this device: worst value over the frozen shapes, worst over the held-out ones, met / not met / not measured."""
    lines = []
    for target in TARGETS:
        if target.device != device:
            continue
        shapes = by_shape(rows, target.benchmark)
        frozen, held_out = (_worst(target, shapes, flag) for flag in (False, True))
        if tiny or frozen is None:
            verdict = "not measured (" + ("tiny shapes" if tiny else _why_not(target, shapes)) + ")"
        else:
            verdict = "met" if target.holds(frozen[0]) else "not met"
            asked = len(_asked(target, shapes, False))
            verdict += "" if frozen[2] == asked else f" on {frozen[2]} of {asked} shapes, the rest not measured"
        lines.append({"op": target.op, "target": target.text, "frozen": frozen, "held_out": held_out, "verdict": verdict})
    return lines
