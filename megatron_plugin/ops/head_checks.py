"""What a caller may pass to the hidden-in ops: everything fits, or a ValueError that says what was got, what was expected and what to do."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.main_grad import MainGrad
from megatron_plugin.ops.checks import check_grad_scale, check_number, check_type
from megatron_plugin.ops.options import Head, Plan, TensorParallel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(hidden: Tensor, weight: Tensor, head: Head) -> None:
    """Hidden states [..., H], weight [V_local, H] and bias [V_local] of one dtype on one device."""
    check_type("hidden", hidden, Tensor, "hidden states [..., tokens, H]")
    check_type("weight", weight, Tensor, "this rank's rows of the output head, [V_local, H]; of a module: module.weight")
    check_type("head", head, Head, "head=Head(vocab_size=...)")
    if head.bias is not None:
        check_type("head.bias", head.bias, Tensor, "[V_local], or None")
    if hidden.dim() < 2 or hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be floating point [..., tokens, H] in fp32, bf16, fp16 or fp64, got {hidden.dtype} {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight {list(weight.shape)} does not fit hidden {list(hidden.shape)}: expected [V_local, {hidden.shape[-1]}], this rank's rows of "
            "the output head (of the embedding, where tied)"
        )
    tensors = {"weight": weight} if head.bias is None else {"weight": weight, "head.bias": head.bias}
    for name, x in tensors.items():
        if x.dtype != hidden.dtype or x.device != hidden.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, hidden {hidden.dtype} on {hidden.device}: expected one dtype and device; cast hidden with "
                f"hidden.to({name}), or the head once when the model is built"
            )
    if head.bias is not None and tuple(head.bias.shape) != (weight.shape[0],):
        raise ValueError(f"head.bias {list(head.bias.shape)} does not fit weight {list(weight.shape)}: expected [{weight.shape[0]}]")
    if head.softcap is not None:
        check_number("head.softcap", head.softcap)
    if head.softcap is not None and not (0 < head.softcap < math.inf):
        raise ValueError(f"head.softcap={head.softcap} is not a positive number; pass None for a head without one")


def token_shape(hidden: Tensor, tp: TensorParallel) -> tuple[int, ...]:
    """Shape of the labels that belong to these hidden states."""
    check_type("tp", tp, TensorParallel, "tp=TensorParallel(group=...)")
    if not tp.sequence_parallel:
        return tuple(hidden.shape[:-1])
    if tp.group is None:
        raise ValueError(
            "tp.sequence_parallel=True without tp.group: hidden states are split over the ranks of a tensor-parallel group; pass it as "
            "TensorParallel(group=..., sequence_parallel=True)"
        )
    return (dist.get_world_size(tp.group) * hidden.shape[0], *hidden.shape[1:-1])


def check_plan(plan: Plan, hidden: Tensor, weight: Tensor, *, training: bool) -> None:
    """The numbers of a plan, and that its ledger is this weight's."""
    if plan.chunk_tokens is not None and (not isinstance(plan.chunk_tokens, int) or plan.chunk_tokens < 1):
        raise ValueError(f"plan.chunk_tokens={plan.chunk_tokens!r}: expected at least 1 token per chunk, or None to choose by memory")
    check_number("plan.min_weight", plan.min_weight)
    if not (0 <= plan.min_weight < math.inf):
        raise ValueError(f"plan.min_weight={plan.min_weight}: expected a number >= 0; 0 drops nothing")
    wider = (torch.float32,) if hidden.dtype.itemsize < 4 else ()
    if plan.logits_dtype not in (None, hidden.dtype, *wider):
        expected = " or ".join(map(str, (hidden.dtype, *wider)))
        raise ValueError(f"plan.logits_dtype={plan.logits_dtype} with {hidden.dtype} hidden states: expected {expected}, or None for the first")
    check_grad_scale("plan.grad_scale", plan.grad_scale, hidden)
    if plan.main_grad is not None:
        check_type("plan.main_grad", plan.main_grad, MainGrad, "the ledger of the weight, MainGrad(weight), made once and kept with it")
        if plan.main_grad.weight is not weight:
            raise ValueError("plan.main_grad is the ledger of another weight; make one with MainGrad(weight) and keep it with that weight")
        if training and weight.requires_grad:
            plan.main_grad.target()


def check_labels_on_cpu(labels: Tensor, shard: Shard) -> None:
    """A label outside the vocabulary, with its place among all labels (the chunks would name its place within one)."""
    stray = shard.stray(labels)
    if stray.any():
        place = tuple(int(i) for i in stray.nonzero()[0])
        raise ValueError(
            f"label {int(labels[place])} at {list(place)} is outside the vocabulary [0, {shard.vocab_size}) and is not "
            f"ignore_index={shard.ignore_index}: was the data tokenized with another tokenizer?"
        )


def checked_rows(rows: Tensor, tokens: int) -> Tensor:
    """plan.rows as contiguous int64 on the host: ascending places in [0, tokens)."""
    if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"plan.rows is {got}: expected a 1-d int64 tensor of token places; from a mask: mask.reshape(-1).nonzero().view(-1)")
    if rows.device.type != "cpu":
        raise ValueError(
            f"plan.rows is on {rows.device}: reading it would stall the queue; make it on the host, where the data layer masks the tokens, or "
            "leave it out"
        )
    rows = rows.long().contiguous()
    if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= tokens or bool((rows[1:] <= rows[:-1]).any())):
        raise ValueError(
            f"plan.rows must be ascending places among the {tokens} flattened labels, each once: got {len(rows)} of them from "
            f"{int(rows.min())} to {int(rows.max())}"
        )
    return rows


def check_nothing_lost(labels: Tensor, rows: Tensor, ignore_index: int) -> None:
    """On the CPU: every live token is among the rows."""
    missed = labels != ignore_index
    missed[rows] = False
    if missed.any():
        place = int(missed.nonzero()[0])
        raise ValueError(
            f"plan.rows leaves out {int(missed.sum())} token(s) that are not masked, the first at place {place} of the flattened labels: their "
            "loss would be lost; make rows from the same mask as labels and coefficient"
        )
