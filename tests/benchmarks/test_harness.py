"""The benchmarks' own arithmetic and honesty: hand-checked numbers, wrong and absent contenders, verdicts, the page."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import page, rivals, shapes, targets
from benchmarks._rival_tools import files_alone
from megatron_plugin.bench.cases import OBJECTIVES, linear_case, logits_case, objective_sum
from megatron_plugin.bench.harness import (
    Contender,
    NotMeasured,
    Run,
    Work,
    check,
    compare,
    finish_rows,
    interleave,
    percentile,
    relative_error,
)

CPU = torch.device("cpu")
SHAPE = shapes.Shape(40, 300, dtype="fp32")


def test_percentiles_between_neighbours():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [percentile(values, q) for q in (0, 0.2, 0.5, 0.8, 1)] == [1.0, 1.8, 3.0, 4.2, 5.0]
    assert percentile([7.0], 0.8) == 7.0


class FakeClock:
    """Each contender takes the milliseconds it says; the order of calls is kept."""

    def __init__(self) -> None:
        self.order = []

    def time(self, run):
        ms = run.call(run.prepare())
        self.order.append(ms)
        return lambda: ms


def test_contenders_take_turns_and_slow_ones_leave_earlier():
    clock = FakeClock()
    runs = {"fast": Run(lambda _: 10.0), "slow": Run(lambda _: 100.0)}
    times = interleave(runs, clock, CPU, seconds=0.08, least=2, most=50)
    # 40 ms each: 4 calls of 10 ms; of 100 ms none, so the least, 2.  The first round warms up and is not counted
    assert times == {"fast": [10.0] * 4, "slow": [100.0] * 2}
    assert clock.order == [10.0, 100.0, 10.0, 100.0, 10.0, 100.0, 10.0, 10.0]


def test_after_the_deadline_those_first_in_the_list_are_still_measured():
    case, calls = logits_case(SHAPE, "cpu"), []
    first, second = compare(case, [Contender("first", _stats(0.0, calls)), Contender("second", _stats(0.0, calls))], Work(), deadline=0.0)
    assert first["rounds"] == 1 and second["reason"] == "time budget spent"


def test_prepare_comes_before_every_call_and_a_failure_keeps_the_others():
    log, bomb = [], iter([1.0, 1.0])
    runs = {"good": Run(lambda state: log.append(state) or 5.0, lambda: "fresh"), "bad": Run(lambda _: next(bomb))}
    times = interleave(runs, FakeClock(), CPU, seconds=0, least=3, most=3)
    assert times["good"] == [5.0] * 3 and log == ["fresh"] * 4
    assert times["bad"] == "failed: StopIteration: "


def test_rates_and_shares_by_hand():
    contenders = [Contender("ceiling.copy", None, work=Work(bytes=4_000_000)), Contender("ours", None), Contender("gone", None)]
    facts = {c.name: {"errors": {}, "peak_mib": None, "reason": ""} for c in contenders} | {"gone": {"errors": {}, "peak_mib": None, "reason": "not here"}}
    times = {"ceiling.copy": [1.0, 1.0, 1.0], "ours": [2.0, 0.5, 1.0]}
    copy, ours, gone = finish_rows(SHAPE, contenders, facts, times, Work(bytes=3_000_000, flops=7_000_000_000))
    assert (copy["gb_s"], copy["share_copy"]) == (4.0, 1.0)
    assert (ours["ms"], ours["p20"], ours["p80"], ours["rounds"]) == (1.0, 0.7, 1.6, 3)
    assert (ours["gb_s"], ours["tflop_s"], ours["share_copy"]) == (3.0, 7.0, 0.75)
    assert gone["ms"] is None and gone["reason"] == "not here" and "share_copy" not in gone


def _stats(offset: float, calls: list):
    def build(case):
        def call(_):
            calls.append(offset)
            return {"logp": rivals.stats_lse(case.logits, case.labels, 1.0)[0] * (1 + offset)}

        return Run(call)

    return build


def _absent(case):
    import a_library_that_is_not_installed  # noqa: F401


def _unfit(case):
    raise NotMeasured("takes no fp32")


def test_wrong_outputs_are_refused_before_timing_and_absent_rivals_are_not_measured():
    case, calls = logits_case(SHAPE, "cpu"), []
    contenders = [
        Contender("right", _stats(0.0, calls)), Contender("wrong", _stats(0.01, calls)), Contender("absent", _absent), Contender("unfit", _unfit),
        Contender("slow", _stats(0.0, calls), slow_start=True),
    ]  # fmt: skip
    case.shape = shapes.Shape(40, 300, dtype="fp32", rivals=False)
    right, wrong, absent, unfit, slow = compare(case, contenders, Work(bytes=1), seconds=0, least=4)
    assert right["rounds"] == 4 and right["errors"]["logp"] < 1e-6
    assert wrong["ms"] is None and wrong["reason"] == "refused, wrong output: logp 1.0e-02 > 1e-03" and calls.count(0.01) == 1
    assert absent["ms"] is None and absent["reason"] == "not importable (No module named 'a_library_that_is_not_installed')"
    assert (unfit["ms"], unfit["reason"]) == (None, "takes no fp32")
    assert slow["reason"].startswith("not run at this shape")


@pytest.mark.parametrize("fault", ["forgets the entropy", "one row unwritten", "NaN", "label's column missing"])
def test_the_comparison_catches(fault):
    case = logits_case(shapes.Shape(60, 500), "cpu")
    logits = case.original.float().requires_grad_()
    logp, entropy = rivals.stats_lse(logits, case.labels, 1.0)
    loss = objective_sum("dft+entropy", logp, entropy.detach() if fault == "forgets the entropy" else entropy, case.live)
    (dlogits,) = torch.autograd.grad(loss, logits)
    out = dlogits.to(torch.bfloat16)
    assert check(case, {"dlogits:dft+entropy": dlogits.to(torch.bfloat16)})[1] == "" or fault == "forgets the entropy"
    if fault == "one row unwritten":
        out[30] = 0
    if fault == "NaN":
        out[30, 7] = torch.nan
    if fault == "label's column missing":
        out[torch.arange(60), case.labels] = 0
    assert check(case, {"dlogits:dft+entropy": out})[1].startswith("refused")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_truths_agree_with_autograd_in_fp64(objective):
    """The two closed forms of cases.py, masked rows and a temperature included."""
    shape = shapes.Shape(50, 400, 64, dtype="fp32", temperature=0.7, masked=0.3)
    case = linear_case(shape, "cpu")
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    z = hidden @ weight.t() / 0.7
    log_p = z.log_softmax(-1)
    logp = torch.where(case.live, log_p.gather(1, case.labels.clamp(min=0)[:, None])[:, 0], 0.0)
    entropy = torch.where(case.live, -(log_p.exp() * log_p).sum(-1), 0.0)
    loss = objective_sum(objective, logp, entropy, case.live)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    for name, output in {f"loss:{objective}": loss, f"dhidden:{objective}": d_hidden, f"dweight:{objective}": d_weight}.items():
        assert relative_error(case.pick(name, output), case.expected(name)) < 1e-5, name
    case = logits_case(shapes.Shape(50, 400, dtype="fp32", temperature=0.7, masked=0.3), "cpu")
    z = case.original.double().requires_grad_()
    log_p = (z / 0.7).log_softmax(-1)
    logp = torch.where(case.live, log_p.gather(1, case.labels.clamp(min=0)[:, None])[:, 0], 0.0)
    entropy = torch.where(case.live, -(log_p.exp() * log_p).sum(-1), 0.0)
    (d_logits,) = torch.autograd.grad(objective_sum(objective, logp, entropy, case.live), z)
    name = f"dlogits:{objective}"
    assert relative_error(case.pick(name, d_logits), case.expected(name)) < 1e-12


def test_inputs_have_the_token_probabilities_they_promise():
    for case in (logits_case(shapes.Shape(4000, 512, dtype="fp32"), "cpu"), linear_case(shapes.Shape(4000, 512, 256, dtype="fp32"), "cpu")):
        p_T = case.truth["logp"].exp()
        assert 0.4 < float((p_T > 0.9).double().mean()) < 0.7 and 0.7 < float(-case.truth["logp"].mean()) < 1.3
    again = logits_case(shapes.Shape(4000, 512, dtype="fp32"), "cpu")
    assert torch.equal(again.original, logits_case(shapes.Shape(4000, 512, dtype="fp32"), "cpu").original), "the seed is part of the shape"


def test_held_out_shapes_are_not_among_the_frozen_ones_and_a_budget_cuts_neither():
    for table in (shapes.LOGITS, shapes.SHARDS, shapes.LINEAR):
        for device, every in table.items():
            frozen, held_out = ({(s.T, s.V, s.H, s.dtype) for s in every if s.held_out == flag} for flag in (False, True))
            assert not frozen & held_out
            order = [s.rivals and not s.held_out or s.held_out for s in shapes.select(table, device)]
            assert order == sorted(order, reverse=True) and len(order) == len(every)
    assert all(s.T * s.V * 2 > 2 * 32 * 2**20 for s in shapes.LOGITS["cpu"]), "larger than the cache"
    assert len(shapes.select(shapes.LOGITS, "cuda", quick=True)) == 3


def test_a_rivals_files_run_without_its_package(tmp_path, monkeypatch):
    folder = tmp_path / "broken_rival" / "ops"
    folder.mkdir(parents=True)
    (tmp_path / "broken_rival" / "__init__.py").write_text("raise RuntimeError('needs a compiled core')")
    (folder / "loss.py").write_text("from broken_rival.ops.tools import TWO\n")
    (folder / "tools.py").write_text("TWO = 2\n")
    monkeypatch.setenv("RIVAL_FILES", str(tmp_path))
    assert files_alone("broken_rival.ops.loss", forget=True).TWO == 2
    with pytest.raises(ModuleNotFoundError):
        __import__("broken_rival")
    with pytest.raises(ImportError, match="No module named 'nobody'"):
        files_alone("nobody.at_all")


def _row(benchmark="stats_forward", shape="512x151936 fp32", contender="ours", ms=1.0, **more):
    facts = {"T": 512, "H": 0, "V": 151936, "dtype": "fp32", "held_out": False, "says": "", "reason": "", "errors": {}, "peak_mib": None}
    spread = {"p20": ms, "p80": ms, "gb_s": 1.0, "tflop_s": 0.0} if ms else {}
    return {"benchmark": benchmark, "shape": shape, "contender": contender, "ms": ms, **facts, **spread, **more}


def _verdict(rows, text, device="cpu", **options):
    return next(line for line in targets.verdicts(rows, device, **options) if line["target"].startswith(text))


def test_verdicts():
    rows = [_row(share_read=0.61), _row(contender="compile.lse", ms=2.6), _row(contender="compile.log_softmax", ms=9.0), _row(contender="eager", ms=9.9)]
    met, missed = _verdict(rows, ">= 2.5x torch.compile"), _verdict(rows, ">= 10x eager")
    assert (met["verdict"], met["frozen"]) == ("met", (2.6, "512x151936 fp32", 1)), "the faster of the two compiled forms counts"
    assert (missed["verdict"], missed["frozen"][0]) == ("not met", 9.9)
    assert _verdict(rows, ">= 60 % of read")["verdict"] == "met"
    assert _verdict(rows, ">= 2.5x torch.compile", tiny=True)["verdict"] == "not measured (tiny shapes)"
    rows.append(_row(shape="512x151936 bf16", dtype="bf16", ms=1.0))
    rows.append(_row(shape="512x151936 bf16", dtype="bf16", contender="eager", ms=10.5))
    assert _verdict(rows, ">= 10x eager")["verdict"] == "not met", "the worst shape decides"
    held_out = [_row(shape="h", held_out=True), _row(shape="h", held_out=True, contender="eager", ms=3.0)]
    assert _verdict(rows + held_out, ">= 10x eager")["held_out"][0] == 3.0


def test_a_target_without_its_rival_is_not_measured_whatever_ours_did():
    one = {"benchmark": "loss_forward_backward", "shape": "8192x151936 bf16"}
    rows = [_row(**one, contender="ours.token_loss"), _row(**one, contender="te", ms=None, reason="not importable (No module named 'te')")]
    assert _verdict(rows, ">= 1.0x TE", "cuda")["verdict"] == "not measured (not importable (No module named 'te'))"
    assert _verdict([], ">= 1.0x TE", "cuda")["verdict"] == "not measured (no such row)"
    assert all(line["verdict"].startswith("not measured") for device in ("cpu", "cuda") for line in targets.verdicts([], device))


def test_the_page_of_a_result_file(tmp_path):
    golden = Path(__file__).parent / "golden_page.md"
    run = {"date": "2026-11-21 10:00 UTC", "commit": "0123456789ab", "dirty": True, "command": "python -m benchmarks.stats_forward", "device": "cpu",
           "cpu": "a CPU (avx2)", "cores": 2, "threads": 2, "load_before": 0.5, "load_after": 1.5, "seconds": 12.3, "versions": {"torch": "2.13.0"},
           "benchmark": "stats_forward", "claim": "One read."}  # fmt: skip
    rows = [
        _row(contender="ceiling.read.max", ms=0.6, share_read=1.0, says="reads only"), _row(share_read=0.6, errors={"logp": 1.2e-7, "entropy": 3e-7}),
        _row(contender="compile.lse", ms=2.6, share_read=0.23, p20=2.512, p80=2.7), _row(contender="quack", ms=None, reason="not importable (No module named 'quack')"),
    ]  # fmt: skip
    page.write({"runs": [run], "rows": rows, "notes": ["Step tests: exit 1."]}, tmp_path / "a")
    text = (tmp_path / "a.md").read_text()
    assert text.startswith(golden.read_text())
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == rows
    again = page.merge([json.loads((tmp_path / "a.json").read_text())])
    assert page.render(again) == text.partition("\n![")[0]
