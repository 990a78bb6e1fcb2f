"""The tables, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.scale.cases import CASES, MODELS, PUBLISHED, Case
from benchmarks.scale.cluster import GIB, H200, activation_bytes, engine_tokens_per_s, step_time, transfer_s
from benchmarks.scale.model import BF16, FP32, held, parameters
from benchmarks.scale.traffic import traffic

__all__ = ["markdown", "tables"]

GB = 1e9


def tables() -> dict[str, str]:
    return {"sizes": _sizes(), "memory": _memory(), "traffic": _traffic(), "time": _time(), "rollouts": _rollouts()}


def markdown(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heading), *map(list, rows)]
    return "\n".join(["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(lines[0]), *("| " + " | ".join(line) + " |" for line in lines[1:])])


def _sizes() -> str:
    rows = []
    for name, model in MODELS.items():
        count, tokens = parameters(model), 8192
        rows.append([name, model.name, f"{count:,}", "yes" if count == PUBLISHED[name] else "NO", f"{count * BF16 / GIB:.1f}", f"{count * 12 / GIB:.0f}",
                     f"{model.sizes.step(tokens=1, length=tokens) / 1e9:.1f}"])  # fmt: skip
    return markdown(["class", "model", "parameters", "as published", "weights bf16, GiB", "optimizer, GiB", "GFLOP a token at 8192"], rows)


def _layout(case: Case) -> list[str]:
    layout = case.layout
    return [f"{case.model} on {layout.ranks}{', packed' if case.packed else ''}", f"{layout.tensor} x {layout.pipeline} x {layout.data}"]


def _memory() -> str:
    rows = []
    for case in CASES:
        model, own = MODELS[case.model], held(MODELS[case.model], case.layout)
        activations = activation_bytes(model, case.layout, case.batch, recompute=case.packed, packed=case.packed)
        rows.append([*_layout(case), *(f"{size / GIB:.1f}" for size in (own.weights, own.gradients, own.optimizer, activations, own.total + activations)),
                     "all layers" if case.packed else "none", f"{(own.total + activations) / H200.memory:.0%}"])  # fmt: skip
    return markdown(["case", "t x p x d", "weights", "gradients", "optimizer", "activations", "together, GiB", "recomputed", "of an H200"], rows)


def _traffic() -> str:
    rows = []
    for case in CASES:
        model, last = MODELS[case.model], case.layout.pipeline - 1
        first, end = traffic(model, case.layout, case.batch), traffic(model, case.layout, case.batch, last)
        logits = case.batch.micro_batches * case.batch.rows * case.batch.length * model.sizes.vocabulary * FP32
        rows.append([*_layout(case), f"{case.step_tokens / 2**20:.0f} M", f"{first.layers / GB:.0f}", f"{end.statistics / 2**20:.1f} MiB", f"{logits / GB:.0f} GB",
                     f"{first.stages / GB:.1f}", f"{first.gradients / GB:.1f}", f"{first.weights / GB:.1f}"])  # fmt: skip
    return markdown(["case", "t x p x d", "tokens a step", "layers, GB", "loss statistics", "logits in their place", "to the next stage, GB", "gradients, GB", "weights, GB"], rows)


def _time() -> str:
    rows = []
    for case in CASES:
        took = step_time(MODELS[case.model], case.layout, case.batch, H200, recompute=case.packed, packed=case.packed)
        flops = MODELS[case.model].sizes.step(tokens=case.step_tokens, length=case.batch.length)
        mfu = [flops / (seconds * case.layout.ranks * H200.flops) for seconds in (took.worst, took.best)]
        parts = (took.compute, took.scores, took.bubble, took.tensor, took.stages, took.replicas)
        rows.append([*_layout(case), *(f"{part:.2f}" for part in parts), f"{took.best:.1f} to {took.worst:.1f}", f"{mfu[0]:.0%} to {mfu[1]:.0%}",
                     f"{case.step_tokens / took.worst / case.layout.ranks:,.0f} to {case.step_tokens / took.best / case.layout.ranks:,.0f}"])  # fmt: skip
    return markdown(["case", "t x p x d", "compute", "scores", "bubble", "tensor", "stages", "replicas", "step, s", "MFU", "tokens/s/GPU"], rows)


def _rollouts() -> str:
    rows = []
    for case in CASES:
        model, rollout = MODELS[case.model], case.rollout
        rate = engine_tokens_per_s(model, rollout, H200)
        took = step_time(model, case.layout, case.batch, H200, recompute=case.packed, packed=case.packed)
        engines = case.step_tokens / took.worst / rate
        rows.append([*_layout(case), f"{parameters(model) * BF16 / GB:.0f}", f"{transfer_s(model, H200):.1f}", f"{rollout.tensor}", f"{rate:,.0f}", f"{engines:.0f}",
                     f"{engines * rollout.tensor / case.layout.ranks:.1f}"])  # fmt: skip
    return markdown(["trainer", "t x p x d", "weights, GB", "sent in, s", "GPUs an engine", "tokens/s an engine", "engines that keep pace", "GPUs of engines to one of the trainer"], rows)
