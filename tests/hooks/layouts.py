"""Layouts that must give one step's loss and gradient, and how far each is from one rank with megatron-core's own head.

    python -m tests.hooks.layouts        # measures all of them and writes megatron_plugin/hooks/LAYOUTS.md
"""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path

from tests import tolerances as tol
from tests.hooks.layout_ranks import OBJECTIVES, WAYS, Layout
from tests.spawn import on_ranks

RANKS = "tests.hooks.layout_ranks"
PAGE = Path(__file__).parents[2] / "megatron_plugin/hooks/LAYOUTS.md"
NOTHING = 1e-7
"""Gradients whose norms are both below it count as equal."""

LAYOUTS = {
    "TP1": Layout(),
    "TP1, 1 micro-batch": Layout(micro_batches=1),
    "TP1, 4 micro-batches": Layout(micro_batches=4),
    "TP1, 8 micro-batches": Layout(micro_batches=8),
    "TP1, packed rows": Layout(packed=True),
    "TP2": Layout(2, tensor=2),
    "TP2, tied embeddings": Layout(2, tensor=2, tied=True),
    "TP4": Layout(4, tensor=4),
    "TP2 SP": Layout(2, tensor=2, sequence=True),
    "PP2": Layout(2, pipeline=2, micro_batches=4),
    "PP2, tied embeddings": Layout(2, pipeline=2, tied=True),
    "PP2 VPP2": Layout(2, pipeline=2, virtual=2, micro_batches=4),
    "CP2": Layout(2, context=2),
    "CP2, packed rows": Layout(2, context=2, packed=True),
    "TP2 CP2": Layout(4, tensor=2, context=2),
    "TP2 SP CP2, 8 micro-batches": Layout(4, tensor=2, sequence=True, context=2, micro_batches=8),
    "DP2": Layout(2),
    "DP2, overlapped reduction": Layout(2, overlap=True, micro_batches=4),
    "DP2, distributed optimizer": Layout(2, distributed_optimizer=True),
    "DP2, distributed optimizer, overlapped": Layout(2, distributed_optimizer=True, overlap=True),
    "CP2 DP2, distributed optimizer": Layout(4, context=2, distributed_optimizer=True),
    "TP2 PP2 SP": Layout(4, tensor=2, pipeline=2, sequence=True, micro_batches=4),
    "TP2 PP2 SP, tied embeddings, packed rows": Layout(4, tensor=2, pipeline=2, sequence=True, tied=True, packed=True),
    "PP2 DP2": Layout(4, pipeline=2, micro_batches=4),
}


@cache
def checkpoint(tied: bool) -> str:
    """A checkpoint of one rank, that all layouts load."""
    folder = tempfile.mkdtemp(prefix="layouts")
    on_ranks(1, RANKS, "save", checkpoint=folder, tied=tied)
    return folder


@cache
def truth(tied: bool) -> dict:
    """{objective: (token means, {key: whole gradient})} of one rank, one micro-batch, megatron-core's own head and `token_loss`."""
    (result,) = on_ranks(1, RANKS, "step", layout=Layout(micro_batches=1, tied=tied), checkpoint=checkpoint(tied), ways=("logits",))
    return {objective: (means, _whole(parts)) for (objective, _), (means, parts) in result.items()}


def _whole(parts: list) -> dict:
    whole = {}
    for key, shape, offset, part in parts:
        target = whole.setdefault(key, part.new_full(shape, float("nan")))
        target[_at(offset, part.shape)] = part
    return whole


def _at(offset: tuple, shape: tuple) -> tuple:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def differences(name: str) -> dict[tuple[str, str], tuple[float, float, str]]:
    """{(objective, way): (relative difference of the loss, largest relative L2 difference of a parameter's gradient, that parameter)}."""
    layout = LAYOUTS[name]
    ranks = on_ranks(layout.ranks, RANKS, "step", layout=layout, checkpoint=checkpoint(layout.tied))
    found = {}
    for objective in OBJECTIVES:
        true_means, true_gradients = truth(layout.tied)[objective]
        for way in WAYS:
            means = [rank[objective, way][0] for rank in ranks if rank[objective, way][0] is not None]
            assert means and all(m["num_tokens"] == true_means["num_tokens"] for m in means), (objective, way, means)
            loss = max(_finite(abs(m[key] - true_means[key]) / abs(true_means[key])) for m in means for key in ("lm loss", "nll", "entropy"))
            seen = {key: true.new_zeros(true.shape) for key, true in true_gradients.items()}
            worst = (0.0, "")
            for rank in ranks:
                for key, _, offset, part in rank[objective, way][1]:
                    place = _at(offset, part.shape)
                    seen[key][place] = 1
                    worst = max(worst, (_distance(part, true_gradients[key][place]), key))
            assert all(x.all() for x in seen.values()), f"{name}: parts of {[k for k, x in seen.items() if not x.all()]} on no rank"
            found[objective, way] = (loss, *worst)
    return found


def _distance(a, b) -> float:
    scale = float(b.norm())
    return 0.0 if scale < NOTHING and float(a.norm()) < NOTHING else _finite(float((a - b).norm()) / scale)


def _finite(difference: float) -> float:
    assert math.isfinite(difference), "max() would drop a NaN"
    return difference


def main() -> None:
    """Measure every layout, print and keep the table."""
    lines = [
        "# One step in every layout",
        "",
        "Written by `python -m tests.hooks.layouts` (megatron-core on CPU tensors, gloo, fp32). One checkpoint and one batch, with unequal masks, a",
        "micro-batch without a loss token and context-parallel ranks without one. Each cell: largest relative difference of loss, NLL and entropy / largest",
        "relative L2 difference of a parameter's gradient, against one rank, one micro-batch and logits from megatron-core's own head; the worst of the ways",
        f"{', '.join(WAYS)}. `tests/hooks/test_layouts.py` holds 1e-6 and 1e-5.",
        "",
        f"| layout | {' | '.join(OBJECTIVES)} |",
        "|---" * (len(OBJECTIVES) + 1) + "|",
    ]
    for name in LAYOUTS:
        found = differences(name)
        assert all(loss <= tol.LAYOUT_LOSS and grad <= tol.LAYOUT_GRAD for loss, grad, _ in found.values()), f"{name}: {found}"
        cells = [f"{max(found[o, w][0] for w in WAYS):.1e} / {max(found[o, w][1] for w in WAYS):.1e}" for o in OBJECTIVES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
