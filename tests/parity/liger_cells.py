"""Liger's cells: its chunked GRPO loss as it is, and its fused linear cross-entropy with token scaling, whose kernel runs in Triton's interpreter.

Both take hidden states and a head, so the gradients compared are those by the hidden states and by the head's weight, laid end to end; ours
are `linear_token_loss`'s.  Logits of the case are made by a head of as many hidden units as columns.
"""

from __future__ import annotations

from functools import partial

import torch
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from torch import Tensor

from megatron_plugin import Head, bind, linear_token_loss
from megatron_plugin.parallel.normaliser import Source, StepMask, coefficients, count_step, divisor, sequence_tokens
from tests.parity import ours
from tests.parity.case import NEVER_SAMPLED, Case, S, V
from tests.parity.cell import Cell
from tests.parity.ours import CONSTANT, SEQUENCE, TOKEN, Answer

CLIPS = ours.CLIPS | {"dual_clip": float("inf")}
SINGLE = (torch.float32,)


def head_of(case: Case) -> tuple[Tensor, Tensor]:
    """Hidden states [b, s, V] and a weight [V, V], leaves, whose product is nearly the case's logits: an orthogonal head."""
    g = torch.Generator().manual_seed(5)
    weight = torch.linalg.qr(torch.randn(V, V, generator=g, dtype=torch.float64))[0].to(case.dtype)
    return (case.logits @ weight).detach().requires_grad_(), weight.clone().requires_grad_()


def answer(loss: Tensor, hidden: Tensor, weight: Tensor) -> Answer:
    grads = torch.autograd.grad(loss, (hidden, weight))
    return Answer(loss.detach(), torch.cat([grad.reshape(-1) for grad in grads]))


def mine(name: str, source: Source = TOKEN, **params):
    def side(case: Case) -> Answer:
        hidden, weight = head_of(case)
        mask = StepMask(case.mask.float(), None, sequence_tokens(case.mask.float()))
        counts = count_step([mask])
        inputs = ours.inputs(case, coefficients(mask, counts, rollout=source), extra=ours.extras(case, name))
        labels = case.labels.masked_fill(~case.mask, NEVER_SAMPLED)
        out = linear_token_loss(hidden, weight, labels, bind(name, **params), inputs=inputs, head=Head(temperature=case.temperature))
        return answer(out.loss_sum / divisor(counts, expert=Source(), rollout=source), hidden, weight)

    return side


def fused_cross_entropy(scaling: bool, case: Case) -> Answer:
    hidden, weight = head_of(case)
    labels = case.labels.masked_fill(~case.mask, NEVER_SAMPLED).view(-1)
    scaled = hidden.reshape(-1, V) / case.temperature
    loss = LigerFusedLinearCrossEntropyFunction.apply(
        scaled, weight, labels, None, None, NEVER_SAMPLED, 0.0, 0.0, "mean", None, False, None, scaling)[0]  # fmt: skip
    return answer(loss, hidden, weight)


def grpo(ratio: bool = False, **options):
    def peer(case: Case) -> Answer:
        hidden, weight = head_of(case)
        made = LigerFusedLinearGRPOLoss(
            compiled=False, epsilon_low=0.2, temperature=case.temperature, max_completion_length=S,
            **{"beta": 0.0, "use_ref_model": False, "epsilon_high": 0.28} | options)  # fmt: skip
        weights = (case.old_logp - case.rollout_logp).exp().clamp(max=2.0) if ratio else None
        loss, *_ = made(hidden, weight, case.labels, case.mask.to(case.dtype), case.advantage, ref_per_token_logps=case.ref_logp,
                        old_per_token_logps=case.old_logp, vllm_is_ratio=weights)  # fmt: skip
        return answer(loss, hidden, weight)

    return peer


FUSED = "LigerFusedLinearCrossEntropyFunction"
GRPO = "LigerFusedLinearGRPOLoss"
CELLS = [
    Cell(f"{FUSED}", 'linear_token_loss(..., "sft")', partial(fused_cross_entropy, False), mine("sft"), dtypes=SINGLE),
    Cell(f"{FUSED}, use_token_scaling", 'linear_token_loss(..., "dft")', partial(fused_cross_entropy, True), mine("dft"), dtypes=SINGLE),
    Cell(f"{GRPO}, dapo", "grpo, dual_clip=inf, token mean", grpo(loss_type="dapo"), mine("grpo", **CLIPS), dtypes=SINGLE),
    Cell(f"{GRPO}, bnpo", "grpo, dual_clip=inf, token mean", grpo(loss_type="bnpo"), mine("grpo", **CLIPS), dtypes=SINGLE),
    Cell(f"{GRPO}, grpo", 'grpo, Source(denominator="sequence")', grpo(loss_type="grpo"), mine("grpo", SEQUENCE, **CLIPS), dtypes=SINGLE),
    Cell(f"{GRPO}, dr_grpo", 'grpo, Source(denominator="constant", constant=max_completion_length)', grpo(loss_type="dr_grpo"),
         mine("grpo", CONSTANT, **CLIPS), dtypes=SINGLE),
    Cell(f"{GRPO}, dapo, delta=4", "grpo, dual_clip=4", grpo(delta=4.0), mine("grpo", **CLIPS | {"dual_clip": 4.0}), dtypes=SINGLE),
    Cell(f"{GRPO}, dapo, beta=0.1", 'grpo, kl=0.1, kl_estimator="k3"', grpo(beta=0.1, use_ref_model=True), mine("grpo", kl=0.1, **CLIPS), dtypes=SINGLE),
    Cell(f"{GRPO}, dapo, vllm_is_ratio", "grpo, tis=2", grpo(ratio=True), mine("grpo", tis=2.0, **CLIPS), dtypes=SINGLE),
    Cell(f"{GRPO}, cispo, epsilon_high=5", "cispo, clip_low=1, clip_high=4", grpo(loss_type="cispo", epsilon_high=5.0), mine("cispo"),
         dtypes=SINGLE),
    Cell(f'{GRPO}, grpo, importance_sampling_level="sequence"', 'gspo, Source(denominator="sequence")',
         grpo(loss_type="grpo", importance_sampling_level="sequence"), mine("gspo", SEQUENCE, **ours.CLIPS), dtypes=SINGLE),
]  # fmt: skip
NOT_COMPARED = ("sapo, vespo, use_bias_correction_kl: ours has no such loss or option",)
HOW = "imported, with its wheel on the Python path; the cross-entropy kernel in Triton's interpreter (TRITON_INTERPRET=1), the GRPO loss in plain " \
      "PyTorch (compiled=False); gradients by hidden states and head, fp32 inside whatever it is given"  # fmt: skip
