"""Logits-in rivals, each as its documentation says to use it; a package that is not importable becomes a 'not measured' row.

A builder takes a case and returns a Run; what it imports, it imports inside.  T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F

from benchmarks._rival_tools import files_alone, from_nll, megatron_group, needs
from megatron_plugin.bench.cases import IGNORE, LogitsCase, coefficients, objective_sum
from megatron_plugin.bench.harness import Contender, NotMeasured, Run
from megatron_plugin.bench.pytorch import compiled, expression, in_place, stats_in_one_expression, stats_log_softmax, stats_lse

# ---- statistics, no gradient


def nll_torch(compile: bool = False):
    def nll(logits, labels):
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")

    def build(case: LogitsCase) -> Run:
        needs(case, cuda=False, temperature=False)
        run = compiled(nll) if compile else nll

        @torch.no_grad()
        def call(_):
            return {"logp": -run(case.logits, case.labels)}

        return Run(call)

    return build


STATS = [
    Contender("eager", stats_in_one_expression(stats_log_softmax), "log_softmax + gather + entropy in fp32"),
    Contender("compile.log_softmax", stats_in_one_expression(stats_log_softmax, True), "torch.compile of the same", slow_start=True),
    Contender("compile.lse", stats_in_one_expression(stats_lse, True), "torch.compile of lse - sum(p z)", slow_start=True),
    Contender("F.cross_entropy", nll_torch(), "logp only"),
    Contender("compile.F.cross_entropy", nll_torch(True), "logp only", slow_start=True),
]


# ---- forward and backward


def torch_cross_entropy(objective: str, compile: bool = False):
    def build(case: LogitsCase) -> Run:
        needs(case, cuda=False, temperature=False)

        def nll(logits):
            return F.cross_entropy(logits.float(), case.labels, ignore_index=IGNORE, reduction="none")

        return from_nll(case, objective, compiled(nll) if compile else nll)

    return build


def megatron_nll(fused: bool):
    """megatron-core's loss on [s, b, V]; masked rows get label 0, as its data loaders do, and weight 0."""
    group = megatron_group()
    if fused:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        return lambda logits, labels: fused_vocab_parallel_cross_entropy(logits[:, None], labels.clamp(min=0)[:, None], group)[:, 0]
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    extra = {"tp_group": group} if "tp_group" in inspect.signature(vocab_parallel_cross_entropy).parameters else {}
    return lambda logits, labels: vocab_parallel_cross_entropy(logits[:, None], labels.clamp(min=0)[:, None], **extra)[:, 0]


def megatron_cross_entropy(objective: str, fused: bool):
    def build(case: LogitsCase) -> Run:
        needs(case, cuda=False, temperature=False, dtypes=("bf16",) if fused else ("bf16", "fp32"))  # fused: its gradient is bf16, always
        nll_of = megatron_nll(fused)
        return from_nll(case, objective, lambda logits: nll_of(logits, case.labels))

    return build


def megatron_and_entropy(objective: str):
    """megatron-core's fused loss and a separate entropy from the same logits: verl's vocab-parallel one if importable, else autograd."""

    def build(case: LogitsCase) -> Run:
        needs(case, cuda=False, temperature=False, dtypes=("bf16",))
        nll_of = megatron_nll(fused=True)
        try:
            entropy_of = files_alone("verl.utils.megatron.tensor_parallel").vocab_parallel_entropy
        except Exception:

            def entropy_of(logits):
                return stats_lse(logits, case.labels, 1.0)[1]

        def call(logits):
            entropy = torch.where(case.live, entropy_of(logits.float()), 0.0)  # fp32, as megatron-core hands logits over; before the loss, which may write over the logits
            loss = objective_sum(objective, -nll_of(logits, case.labels), entropy, case.live)
            return {f"loss:{objective}": loss, f"dlogits:{objective}": torch.autograd.grad(loss, logits)[0]}

        return Run(call, in_place(case))

    return build


def liger_cross_entropy(objective: str):
    """Per-token (reduction none) under token weights; 'nll' uses its one-kernel path with reduction sum."""

    def build(case: LogitsCase) -> Run:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        needs(case, temperature=False)
        if objective != "nll":
            run = lambda logits: LigerCrossEntropyFunction.apply(logits, case.labels, None, IGNORE, 0.0, 0.0, "none")[0]  # noqa: E731
            return from_nll(case, objective, run)

        def call(logits):
            loss = LigerCrossEntropyFunction.apply(logits, case.labels, None, IGNORE, 0.0, 0.0, "sum")[0]
            return {"loss:nll": loss, "dlogits:nll": torch.autograd.grad(loss, logits)[0]}

        return Run(call, in_place(case))

    return build


def liger_vocab_parallel(objective: str):
    def build(case: LogitsCase) -> Run:
        from liger_kernel.megatron.cross_entropy import LigerMegatronCrossEntropy

        needs(case, temperature=False)
        loss = LigerMegatronCrossEntropy(ignore_index=IGNORE)
        return from_nll(case, objective, lambda logits: loss(logits[:, None], case.labels[:, None])[:, 0])

    return build


def transformer_engine(objective: str):
    """TE's cross-entropy with its gradient over the logits where the version offers that."""

    def build(case: LogitsCase) -> Run:
        needs(case, temperature=False)
        try:
            from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy
        except Exception:  # the compiled core is missing
            return from_nll(case, objective, _transformer_engine_files(case))
        extra = {"overwrite_input": True} if "overwrite_input" in inspect.signature(parallel_cross_entropy).parameters else {}
        run = lambda logits: parallel_cross_entropy(logits[:, None], case.labels[:, None], 0.0, False, None, IGNORE, **extra)[:, 0]  # noqa: E731
        return from_nll(case, objective, run)

    return build


def _transformer_engine_files(case: LogitsCase):
    """TE's own Triton files without its compiled core, which they do not use; the autograd wrapper is its 12 lines of bookkeeping."""
    place = ("transformer_engine.common.triton",)
    kernels = files_alone("transformer_engine.pytorch.triton.cross_entropy", bare=place, forget=True)  # its name would break megatron-core
    if "overwrite_input" not in inspect.signature(kernels.cross_entropy_forward).parameters:
        raise NotMeasured("this version's files have another interface")

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, labels):
            loss, saved, stats, labels, _, rank, world = kernels.cross_entropy_forward(logits, labels, 0.0, False, None, IGNORE, True)
            ctx.save_for_backward(saved.detach(), stats, labels)
            ctx.place = rank, world
            return loss

        @staticmethod
        def backward(ctx, d_loss):
            saved, stats, labels = ctx.saved_tensors
            return kernels.cross_entropy_backward(saved, stats, labels, None, d_loss, 0.0, False, *ctx.place, IGNORE), None

    return lambda logits: Loss.apply(logits[:, None], case.labels[:, None])[:, 0]


def quack_cross_entropy(objective: str):
    def build(case: LogitsCase) -> Run:
        from quack import cross_entropy

        needs(case, temperature=False)
        run = lambda logits: cross_entropy(logits, case.labels, ignore_index=IGNORE, reduction="none", inplace_backward=True)  # noqa: E731
        return from_nll(case, objective, run)

    return build


def apex_xentropy(objective: str):
    def build(case: LogitsCase) -> Run:
        from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

        needs(case, temperature=False)
        if case.shape.masked:
            raise NotMeasured("takes no ignore index but its padding index")
        return from_nll(case, objective, lambda logits: SoftmaxCrossEntropyLoss.apply(logits, case.labels, 0.0, IGNORE, True))

    return build


FORWARD_BACKWARD = [
    Contender("eager", expression("dft+entropy", stats_log_softmax), "autograd of log_softmax"),
    Contender("compile.log_softmax", expression("dft+entropy", stats_log_softmax, True), "torch.compile of the same", slow_start=True),
    Contender("compile.lse", expression("dft+entropy", stats_lse, True), "torch.compile of lse - sum(p z)", slow_start=True),
    Contender("F.cross_entropy", torch_cross_entropy("dft"), "no entropy"),
    Contender("compile.F.cross_entropy", torch_cross_entropy("dft", True), "no entropy", slow_start=True),
    Contender("mcore.unfused", megatron_cross_entropy("dft", False), "no entropy"),
    Contender("mcore.fused", megatron_cross_entropy("dft", True), "no entropy", slow_start=True),
    Contender("mcore+entropy", megatron_and_entropy("dft+entropy"), "fused loss and a separate entropy", slow_start=True),
    Contender("liger.ce", liger_cross_entropy("dft"), "no entropy, not tensor-parallel"),
    Contender("liger.ce.sum", liger_cross_entropy("nll"), "no entropy, no token weights, not tensor-parallel"),
    Contender("liger.vocab_parallel", liger_vocab_parallel("dft"), "no entropy"),
    Contender("te", transformer_engine("dft"), "no entropy"),
    Contender("quack", quack_cross_entropy("dft"), "no entropy, not tensor-parallel", slow_start=True),
    Contender("apex", apex_xentropy("dft"), "no entropy, not tensor-parallel"),
]


# ---- gradient alone, from statistics already known


def gradientexpression():
    """The gradient written over the logits by one compiled expression; the label's column in fp32, as ours."""

    def grad_(logits, labels, a, b, logp, entropy, lse, temperature):
        log_p = logits.float() / temperature - lse[:, None]
        p = log_p.exp()
        dz = -p * (a[:, None] + b[:, None] * (log_p + entropy[:, None]))
        columns = torch.arange(logits.shape[1], device=logits.device)
        label_T = (a * -torch.expm1(logp) - logp.exp() * b * (logp + entropy))[:, None]
        logits.copy_((torch.where(columns[None] == labels[:, None], label_T, dz) / temperature).to(logits.dtype))

    def build(case: LogitsCase) -> Run:
        a, b = (x.float() for x in coefficients("dft+entropy", case.truth["logp"], case.live))
        stats = [case.truth[key].float() for key in ("logp", "entropy", "lse")]
        run = compiled(grad_)

        @torch.no_grad()
        def call(_):
            run(case.logits, case.labels, a, b, *stats, case.shape.temperature)
            return {"dlogits:dft+entropy": case.logits}

        return Run(call, case.restore)

    return build


GRADIENT = [Contender("compile.where", gradientexpression(), "torch.compile of the formula, in place", slow_start=True)]
