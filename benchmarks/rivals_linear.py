"""Hidden-in rivals: hidden [T, H] and weight [V, H] in, loss and both gradients out.  As rivals.py: absent ones become rows that say so."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._rival_tools import files_alone, needs
from benchmarks.rivals import megatron_nll
from megatron_plugin.bench.cases import IGNORE, LinearCase, objective_sum
from megatron_plugin.bench.harness import Contender, NotMeasured, Run
from megatron_plugin.bench.pytorch import full_logits, gradients, stats_log_softmax, stats_lse


def _nll(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, None]:
    return -F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none"), None


def torch_linear_cross_entropy(case: LinearCase) -> Run:
    """torch >= 2.13; its chunked form takes mean or sum only, so no token weights."""
    needs(case, cuda=False, temperature=False)
    if not hasattr(F, "linear_cross_entropy"):
        raise NotMeasured(f"torch {torch.__version__} has none (2.13 and later)")
    options = torch.nn.LinearCrossEntropyOptions()
    return gradients(
        case, "nll", lambda hidden, weight: F.linear_cross_entropy(hidden, weight, case.labels, reduction="sum", ignore_index=IGNORE, options=options)
    )


def megatron_head(case: LinearCase) -> Run:
    """The head as megatron-core runs it: full logits, then its fused loss."""
    needs(case, cuda=False, temperature=False, dtypes=("bf16",))
    nll_of = megatron_nll(fused=True)
    return gradients(case, "dft", lambda hidden, weight: objective_sum("dft", -nll_of(hidden @ weight.t(), case.labels), None, case.live))


def liger_linear(**options):
    """Fused linear cross-entropy with DFT's token scaling."""

    def build(case: LinearCase) -> Run:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

        needs(case, temperature=False)
        known = list(inspect.signature(Function.forward).parameters)[1:]
        if missing := [name for name in options if name not in known]:
            raise NotMeasured(f"this version has no {', '.join(missing)}")
        named = {"ignore_index": IGNORE, "reduction": "sum", "use_token_scaling": True, **options}

        def loss_of(hidden, weight):
            given = {"_input": hidden, "weight": weight, "target": case.labels, **named}
            last = max(known.index(name) for name in given)
            defaults = {p.name: p.default for p in inspect.signature(Function.forward).parameters.values()}
            return Function.apply(*(given.get(name, defaults[name]) for name in known[: last + 1]))[0]

        return gradients(case, "dft", loss_of)

    return build


def liger_scaled(case: LinearCase) -> Run:
    """Fused linear scaled cross-entropy: nll and entropy, both differentiable."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Function

    needs(case)

    def loss_of(hidden, weight):
        nll, entropy = Function.apply(hidden, weight, case.labels, case.shape.temperature, IGNORE, 1, True)
        return objective_sum("dft+entropy", -nll, entropy.float(), case.live)

    return gradients(case, "dft+entropy", loss_of)


def cut_cross_entropy(filter_eps: str | None):
    def build(case: LinearCase) -> Run:
        from cut_cross_entropy import linear_cross_entropy

        needs(case, temperature=False, dtypes=("bf16",))

        def loss_of(hidden, weight):
            nll = linear_cross_entropy(hidden, weight, case.labels, ignore_index=IGNORE, reduction="none", filter_eps=filter_eps)
            return objective_sum("dft", -nll, None, case.live)

        return gradients(case, "dft", loss_of)

    return build


def quack_linear(case: LinearCase) -> Run:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    needs(case, temperature=False, dtypes=("bf16",))
    if case.shape.T % 8 or case.shape.V % 8:
        raise NotMeasured("needs T and V in multiples of 8")
    return gradients(
        case, "nll", lambda hidden, weight: chunked_linear_cross_entropy(hidden, weight, case.labels, ignore_index=IGNORE, reduction="sum")
    )


def verl_linear(case: LinearCase) -> Run:
    """verl's Triton class: log-probability and entropy; masked rows get label 0 and weight 0, as its trainer does."""
    linear_cross_entropy = files_alone("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    needs(case, dtypes=("bf16",))
    if case.shape.H % 128:
        raise NotMeasured("needs H in multiples of 128")

    def loss_of(hidden, weight):
        logp, entropy = linear_cross_entropy(hidden, weight, case.labels.clamp(min=0), case.shape.temperature, "none", None)
        return objective_sum("dft+entropy", logp, entropy, case.live)

    return gradients(case, "dft+entropy", loss_of)


LINEAR = [
    Contender("eager", full_logits("dft+entropy", stats_log_softmax), "full logits, autograd"),
    Contender("compile.lse", full_logits("dft+entropy", stats_lse, True), "full logits, torch.compile", slow_start=True),
    Contender("compile.F.cross_entropy", full_logits("dft", _nll, True), "full logits, no entropy", slow_start=True),
    Contender("torch.linear_cross_entropy", torch_linear_cross_entropy, "chunked; no entropy, no token weights"),
    Contender("mcore.fused", megatron_head, "full logits, no entropy", slow_start=True),
    Contender("liger.flce", liger_linear(), "token scaling, no entropy; dW in bf16"),
    Contender("liger.flce fp32 dW, larger chunk", liger_linear(accum_dtype=torch.float32, chunk_mem_const=8), "token scaling, no entropy"),
    Contender("liger.flsce", liger_scaled, "entropy too"),
    Contender("cce", cut_cross_entropy("high"), "no entropy; skips small gradients (its default)", slow_start=True),
    Contender("cce exact", cut_cross_entropy(None), "no entropy", slow_start=True),
    Contender("quack", quack_linear, "no entropy, no token weights", slow_start=True),
    Contender("verl", verl_linear, "entropy too", slow_start=True),
]
