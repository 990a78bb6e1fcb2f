"""docs/scale.md: its tables are what the arithmetic prints, and the arithmetic gives the bytes that small runs move and hold."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.scale.cases import CASES, MODELS, PUBLISHED
from benchmarks.scale.cluster import H200, activation_bytes, engine_tokens_per_s, step_time
from benchmarks.scale.model import Layout, Model, held, parameters, stage_parameters
from benchmarks.scale.tables import markdown, tables
from benchmarks.scale.traffic import Batch, traffic
from megatron_plugin.config import load_config
from megatron_plugin.data import generate
from megatron_plugin.trainer.flops import GPTSizes
from tests.spawn import on_ranks

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
LAYOUTS = {
    "1 rank": (Layout(), {}),
    "tensor 2": (Layout(tensor=2), {"parallel.tensor": 2}),
    "pipeline 2": (Layout(pipeline=2), {"parallel.pipeline": 2}),
    "tensor 2, data 2, distributed optimizer, bf16": (Layout(tensor=2, data=2, distributed_optimizer=True),
                                                      {"parallel.tensor": 2, "parallel.distributed_optimizer": "true", "train.dtype": "bf16"}),
}  # fmt: skip
ROWS, LENGTH, GLOBAL = 2, 64, 8
MODEL = {"model.num_query_groups": 2, "model.gated_linear_unit": "true", "model.activation_func": "silu"}  # beside configs/debug_cpu.yaml: as the large ones


def page_table(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.S)
    assert found, f"docs/scale.md has no table {name}"
    return found[1]


@pytest.mark.parametrize("name", list(tables()))
def test_the_page_has_what_the_arithmetic_prints(name):
    assert page_table(name) == tables()[name], "python -m benchmarks.scale prints the new ones"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    assert parameters(MODELS[name]) == PUBLISHED[name]


def test_stages_and_shards_add_up():
    model = MODELS["70B"]
    norms = 2 * 80 * 8192 + 8192  # held by every tensor-parallel rank
    whole = sum(stage_parameters(model, Layout(8, 4), stage) for stage in range(4)) * 8
    assert whole == parameters(model) + 7 * norms


def test_what_more_ranks_do():
    """Directions that no table shows by itself."""
    case = CASES[-1]
    model, batch = MODELS[case.model], case.batch
    took = {pipeline: step_time(model, Layout(8, pipeline, 1, 4), batch, H200, recompute=False, packed=False) for pipeline in (1, 4)}
    assert took[1].bubble == 0 < took[4].bubble and took[1].compute == pytest.approx(4 * took[4].compute)
    assert took[1].best <= took[1].worst and took[1].scores == 0
    assert step_time(model, case.layout, batch, H200, recompute=True, packed=True).best > step_time(model, case.layout, batch, H200, recompute=False, packed=False).best
    kept, again = (activation_bytes(model, case.layout, batch, recompute=recompute, packed=True) for recompute in (False, True))
    assert kept > 5 * again
    assert engine_tokens_per_s(MODELS["7B"], case.rollout, H200) > engine_tokens_per_s(model, case.rollout, H200)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, list[dict]]:
    """Of every layout, what each of its ranks counted."""
    folder = tmp_path_factory.mktemp("scale")
    for split, count in (("train", 400), ("heldout", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generate(split, count, seed=1)))
    data = {"data.train": folder / "train.jsonl", "data.eval": folder / "heldout.jsonl", "data.overlong": "drop", "train.global_batch": GLOBAL, "data.eval_answers": 0}
    return {
        name: on_ranks(layout.ranks, "tests.benchmarks.scale_ranks", "step", overrides=data | MODEL | more | {"run_dir": folder / str(number)})
        for number, (name, (layout, more)) in enumerate(LAYOUTS.items())
    }


def small_model(vocabulary: int) -> Model:
    return Model("debug_cpu", GPTSizes.of(load_config("configs/debug_cpu.yaml", [f"{key}={value}" for key, value in MODEL.items()]).model, vocabulary), padded=-(-vocabulary // 128) * 128)


def counted(rank: dict, operation: str, ranks: int, what: str = "bytes") -> int:
    return rank["traffic"].get((operation, ranks, what), 0)


def moved(name: str, ranks: list[dict]) -> list[tuple[str, float, float]]:
    """(what, predicted, measured) of the traffic of the first rank, or of the last where only that has it."""
    layout, _ = LAYOUTS[name]
    model, first, last = small_model(ranks[0]["vocabulary"]), ranks[0], ranks[-1]
    batch = Batch(ROWS, LENGTH, GLOBAL // ROWS // layout.data, first["tokens"] or last["tokens"])
    expected = traffic(model, layout, batch, bf16=layout.data > 1)
    found = []
    if layout.tensor > 1:
        found.append(("all-reduced by layers and head", expected.layers + expected.head, counted(first, "allreduce", 2)))
        found.append(("all-gathered statistics of the loss", expected.statistics, counted(first, "allgather_base", 2)))
    if layout.pipeline > 1:
        found.append(("sent to the next stage", expected.stages, counted(first, "send", 2)))
        found.append(("sent back by it", expected.stages, counted(last, "send", 2)))
    if layout.data > 1:
        found.append(("reduce-scattered gradients", expected.gradients, counted(first, "reduce_scatter_tensor_coalesced", 2) * layout.data))  # its output was counted
        found.append(("all-gathered weights", expected.weights, counted(first, "allgather_into_tensor_coalesced", 2)))
    return found


def kept(name: str, ranks: list[dict]) -> list[tuple[str, float, float]]:
    layout, _ = LAYOUTS[name]
    found = []
    for rank, stage in ((0, 0), (-1, layout.pipeline - 1))[: layout.pipeline]:
        expected = held(small_model(ranks[0]["vocabulary"]), layout, stage, bf16=layout.data > 1)
        place = f" of stage {stage}" if layout.pipeline > 1 else ""
        found += [(f"{part}{place}", getattr(expected, part), ranks[rank]["held"][part]) for part in ("weights", "gradients", "optimizer")]
    return found


def test_the_arithmetic_gives_what_small_runs_move_and_hold(measured):
    """Bytes, within 1 %: the distributed optimizer pads its buffers, and a few hundred bytes a step are votes, counts and means."""
    rows = []
    for name, ranks in measured.items():
        found = kept(name, ranks) + moved(name, ranks)
        if name == "1 rank":
            found.append(("weights as sent to an engine, fp32", 4 * parameters(small_model(ranks[0]["vocabulary"])), ranks[0]["sent"]))
        for what, expected, got in found:
            assert got == pytest.approx(expected, rel=0.01), (name, what)
            rows.append([name, what, f"{expected:,.0f}", f"{got:,}", f"{got / expected - 1:+.2%}"])
    table = markdown(["run of debug_cpu", "bytes of a rank", "predicted", "measured", "off by"], rows)
    assert page_table("measured") == table, table


def test_what_else_goes_over_the_wire_is_small(measured):
    """Nothing that the arithmetic leaves out."""
    for name, ranks in measured.items():
        for rank in ranks:
            whole = sum(size for (_, group, what), size in rank["traffic"].items() if what == "bytes" and group > 1)
            known = sum(got for _, _, got in moved(name, ranks))
            again = counted(rank, "recv", 2) - counted(ranks[-1], "send", 2) - counted(rank, "reduce_scatter_tensor_coalesced", 2)
            assert abs(whole - known - again) <= 1500, (name, whole, known, rank["traffic"])
