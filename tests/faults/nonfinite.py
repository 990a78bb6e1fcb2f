"""Numbers that are not numbers, on each rank in turn, in one training run per layout with sound steps in between."""

from functools import partial
from pathlib import Path

from tests.faults.guard_ranks import KINDS
from tests.faults.problems import small_run
from tests.faults.promises import Case
from tests.spawn import on_ranks

PROMISE = ("a NaN, an Inf or an all -Inf row on any rank: no rank applies the step (weights and moments keep their hash), all agree in that step, step, rank "
           "and samples are named, the run goes on, and ends with 17 after train.max_nonfinite in a row")  # fmt: skip
LAYOUTS = {
    "TP2xPP2": {"parallel.tensor": "2", "parallel.pipeline": "2"},
    "TP2xDP2 distributed": {"parallel.tensor": "2", "parallel.distributed_optimizer": "true"},
    "PP2xDP2": {"parallel.pipeline": "2"},
}
FEW = [(rank, KINDS[rank % 3]) for rank in range(4)]


def cases(*, full: bool) -> list[Case]:
    if not full:
        return [_case("TP2xPP2", FEW)]
    return [_case(name, [(rank, kind) for kind in KINDS], f", rank {rank}") for name in LAYOUTS for rank in range(4)]


def _case(layout: str, faults: list[tuple[int, str]], place: str = "") -> Case:
    return Case(layout + place, partial(_try, layout=LAYOUTS[layout], faulty=faults), tries=len(faults) + 1)


def _try(folder: Path, *, layout: dict[str, str], faulty: list[tuple[int, str]]) -> None:
    faults = {2 + i + i // 2: fault for i, fault in enumerate(faulty)}  # steps 2, 3, 5, 6, 8, ...
    last = max(faults) + 2
    faults |= {last + i: (faulty[-1][0], "nan") for i in range(3)}
    overrides = small_run(folder, **layout, **{"train.steps": str(last + 10), "train.micro_batch": "1", "train.global_batch": "2", "data.eval": "[]"})
    ranks = on_ranks(4, "tests.faults.guard_ranks", "train", overrides=overrides, faults=faults)
    for rank, found in enumerate(ranks):
        assert found["unchanged"] == {step: step in faults for step in range(1, last + 3)}, f"rank {rank}: {found}"
        assert found["error"] and found["error"].startswith(f"NonFiniteError: step {last + 2}: the loss is nan on rank"), found["error"]
        assert "3 in a row, train.max_nonfinite is 3" in found["error"] and "train.jsonl:" in found["error"]
    lines = ranks[0]["lines"]
    assert [line["step"] for line in lines] == list(range(1, last + 2)) and lines[-1]["guard/skipped_steps"] == len(faults) - 1
    assert all((line["train/loss"] is None or line["train/grad_norm"] is None) == (line["step"] in faults) for line in lines)
    said = ranks[0]["said"].splitlines()
    for step, (rank, kind) in list(faults.items())[:-1]:
        (line,) = [line for line in said if line.startswith(f"step {step}: ")]
        named = line.partition(" on rank")[2].partition(", micro-batch")[0].lstrip("s ").split(", ")
        assert str(rank) in named and len(named) <= 2, f"{kind} on rank {rank}: {line}"  # the tensor- or context-parallel ranks share one loss
        assert "train.jsonl:" in line and f"replay/step_{step:08d}" in line, line
