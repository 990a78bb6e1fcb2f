"""What does not fit is a ValueError with what was got, what was expected and what to do; what merely looks odd is right."""

import pytest
import torch

from megatron_plugin import Head, MainGrad, Plan, TensorParallel, TokenInputs, bind, linear_token_loss, linear_token_stats
from megatron_plugin.losses.contract import TokenTerms

T, H, V = 6, 8, 20


def call(op="loss", *, hidden=None, weight=None, labels=None, **options):
    hidden = torch.randn(T, H) if hidden is None else hidden
    weight = torch.randn(V, H) if weight is None else weight
    labels = torch.randint(0, V, (T,)) if labels is None else labels
    if op == "loss":
        return linear_token_loss(hidden, weight, labels, options.pop("loss", "dft"), **options)
    return linear_token_stats(hidden, weight, labels, **options)


META = torch.device("meta")
FITS_NOT = {
    "hidden as a list": (dict(hidden=[[1.0]]), "hidden is of type list, expected Tensor"),
    "weight as a module": (dict(weight=torch.nn.Linear(H, V)), "weight is of type Linear, expected Tensor: .* module.weight"),
    "labels as a list": (dict(labels=[0] * T), r"labels is of type list, expected Tensor: .*torch.tensor\(labels\)"),
    "head as a dict": (dict(head={"vocab_size": V}), "head is of type dict, expected Head"),
    "head None": (dict(head=None), "head is of type NoneType, expected Head"),
    "tp as a group": (dict(tp=3), r"tp is of type int, expected TensorParallel: tp=TensorParallel\(group=...\)"),
    "group as a number": (dict(tp=TensorParallel(group=3)), "tensor-parallel group is of type int, expected a torch.distributed.ProcessGroup"),
    "plan as a dict": (dict(plan={"chunk_tokens": 2}), "plan is of type dict, expected Plan"),
    "plan None": (dict(plan=None), "plan is of type NoneType, expected Plan"),
    "bias as a list": (dict(head=Head(bias=[0.0] * V)), "head.bias is of type list, expected Tensor"),
    "softcap as text": (dict(head=Head(softcap="30")), "head.softcap='30' is of type str, expected a number"),
    "temperature as text": (dict(head=Head(temperature="1")), "temperature='1' is of type str, expected a number"),
    "temperature infinite": (dict(head=Head(temperature=float("inf"))), "temperature=inf is not finite"),
    "vocabulary as a float": (dict(head=Head(vocab_size=20.0)), "vocab_size=20.0 is of type float, expected a whole number"),
    "min_weight as text": (dict(plan=Plan(min_weight="0")), "plan.min_weight='0'|plan.min_weight=0"),
    "logits_dtype as text": (dict(plan=Plan(logits_dtype="fp32")), "plan.logits_dtype=fp32 with torch.float32 hidden states"),
    "grad_scale as text": (dict(plan=Plan(grad_scale="8")), "plan.grad_scale='8' is of type str, expected a number"),
    "main_grad as a tensor": (dict(plan=Plan(main_grad=torch.zeros(V, H))), r"plan.main_grad is of type Tensor, expected MainGrad: .*MainGrad\("),
    "weight of another H": (dict(weight=torch.randn(V, H + 1)), r"weight \[20, 9\] does not fit hidden \[6, 8\]: expected \[V_local, 8\]"),
    "weight transposed": (dict(weight=torch.randn(H, V)), r"weight \[8, 20\] does not fit hidden"),
    "no columns": (dict(weight=torch.randn(0, H)), r"weight \[0, 8\] does not fit"),
    "weight of another dtype": (dict(weight=torch.randn(V, H).bfloat16()), r"weight is torch.bfloat16 on cpu, hidden torch.float32.*cast"),
    "weight elsewhere": (dict(weight=torch.empty(V, H, device=META)), r"weight is torch.float32 on meta, hidden torch.float32 on cpu"),
    "integer hidden": (dict(hidden=torch.ones(T, H, dtype=torch.int64)), r"hidden must be floating point .* got torch.int64 \[6, 8\]"),
    "hidden of one token without its dimension": (dict(hidden=torch.randn(H)), r"hidden must be .*got torch.float32 \[8\]"),
    "labels of another shape": (dict(labels=torch.zeros(T + 1, dtype=torch.int64)), r"labels \[7\] do not fit hidden \[6, 8\]: expected \[6\]"),
    "labels as floats": (dict(labels=torch.zeros(T)), r"labels must be integer ids, got torch.float32"),
    "labels elsewhere": (dict(labels=torch.zeros(T, dtype=torch.int64, device=META)), r"labels are on meta, hidden on cpu"),
    "bias shape": (dict(head=Head(bias=torch.zeros(V + 1))), r"head.bias \[21\] does not fit weight \[20, 8\]: expected \[20\]"),
    "bias dtype": (dict(head=Head(bias=torch.zeros(V).double())), r"head.bias is torch.float64"),
    "softcap 0": (dict(head=Head(softcap=0.0)), r"head.softcap=0.0 is not a positive number; pass None"),
    "softcap negative": (dict(head=Head(softcap=-30.0)), r"head.softcap=-30.0"),
    "temperature": (dict(head=Head(temperature=0.0)), r"temperature=0.0 is not positive"),
    "vocabulary larger than the head": (dict(head=Head(vocab_size=V + 1)), r"vocab_size=21 .* does not fit 20 logits columns"),
    "vocab_start without vocab_size": (dict(tp=TensorParallel(vocab_start=0)), r"vocab_start=0 was given without vocab_size"),
    "sequence parallel without group": (dict(tp=TensorParallel(sequence_parallel=True)), r"sequence_parallel=True without tp.group"),
    "chunk 0": (dict(plan=Plan(chunk_tokens=0)), r"plan.chunk_tokens=0: expected at least 1 token"),
    "chunk of half a token": (dict(plan=Plan(chunk_tokens=0.5)), r"plan.chunk_tokens=0.5: expected at least 1 token"),
    "min_weight negative": (dict(plan=Plan(min_weight=-0.1)), r"plan.min_weight=-0.1: expected a number >= 0"),
    "min_weight nan": (dict(plan=Plan(min_weight=float("nan"))), r"plan.min_weight=nan: expected a number >= 0"),
    "logits narrower than hidden": (dict(plan=Plan(logits_dtype=torch.bfloat16)), r"plan.logits_dtype=torch.bfloat16 with torch.float32 hidden"),
    "rows on another device": (dict(plan=Plan(rows=torch.zeros(2, dtype=torch.int64, device=META))), r"plan.rows is on meta: reading it would stall"),
    "rows as a mask": (dict(plan=Plan(rows=torch.ones(T, dtype=torch.bool))), r"plan.rows is torch.bool \[6\]: expected .* mask.reshape"),
    "rows as a list": (dict(plan=Plan(rows=[0, 1])), r"plan.rows is list: expected a 1-d int64 tensor"),
    "rows out of range": (dict(plan=Plan(rows=torch.tensor([0, T]))), r"plan.rows must be ascending places among the 6 .* from 0 to 6"),
    "rows below 0": (dict(plan=Plan(rows=torch.tensor([-1, 0]))), r"plan.rows must be ascending"),
    "rows unsorted": (dict(plan=Plan(rows=torch.tensor([1, 0, 2, 3, 4, 5]))), r"plan.rows must be ascending"),
    "rows twice": (dict(plan=Plan(rows=torch.tensor([0, 1, 1, 2, 3, 4, 5]))), r"plan.rows must be ascending"),
    "rows that leave out a live token": (dict(plan=Plan(rows=torch.tensor([0, 1, 2, 4, 5]))), r"leaves out 1 token.*the first at place 3"),
    "grad_scale 0": (dict(plan=Plan(grad_scale=0.0)), r"plan.grad_scale=0.0: expected a finite number other than 0"),
    "grad_scale vector": (dict(plan=Plan(grad_scale=torch.ones(1))), r"plan.grad_scale is torch.float32 \[1\] on cpu: expected a number, or a 0-d"),
    "grad_scale elsewhere": (dict(plan=Plan(grad_scale=torch.ones((), device=META))), r"plan.grad_scale is torch.float32 \[\] on meta: .* on cpu"),
    "ledger of another weight": (dict(plan=Plan(main_grad=MainGrad(torch.nn.Parameter(torch.randn(V, H))))), r"ledger of another weight"),
}  # fmt: skip


@pytest.mark.parametrize("op", ["loss", "stats"])
@pytest.mark.parametrize("case", FITS_NOT)
def test_what_does_not_fit_is_named(op, case):
    options, message = FITS_NOT[case]
    if op == "stats" and case.startswith("min_weight"):
        message = "plan.min_weight="
    with pytest.raises(ValueError, match=message):
        call(op, **options)


@pytest.mark.parametrize("op", ["loss", "stats"])
def test_main_grad_without_a_buffer(op):
    weight = torch.nn.Parameter(torch.randn(V, H))
    with pytest.raises(ValueError, match="the weight has no main_grad; wrap the model in megatron-core's DistributedDataParallel"):
        call(op, weight=weight, plan=Plan(main_grad=MainGrad(weight)))
    weight.main_grad = torch.zeros(V // 2, H)
    with pytest.raises(ValueError, match=r"weight.main_grad is \[10, 8\] on cpu, the weight \[20, 8\]"):
        call(op, weight=weight, plan=Plan(main_grad=MainGrad(weight)))


def test_min_weight_belongs_to_one_pass():
    with pytest.raises(ValueError, match="plan.min_weight=0.1 in linear_token_stats"):
        call("stats", plan=Plan(min_weight=0.1))

    def over_others(stats, inputs):
        return TokenTerms(loss=-stats.logp * stats.logp.detach().mean())

    with pytest.raises(ValueError, match="plan.min_weight=0.1 with loss 'over_others', which looks at other tokens"):
        call("loss", loss=bind(over_others), plan=Plan(min_weight=0.1))


@pytest.mark.parametrize("op", ["loss", "stats"])
def test_a_stray_label_is_named_with_its_place_in_the_batch(op):
    hidden, labels = torch.randn(3, 4, H), torch.randint(0, V, (3, 4))
    labels[2, 1] = V
    with pytest.raises(ValueError, match=r"label 20 at \[2, 1\] is outside the vocabulary \[0, 20\).*another tokenizer"):
        call(op, hidden=hidden, labels=labels, plan=Plan(chunk_tokens=2))


def test_inputs_are_checked_against_the_labels():
    with pytest.raises(ValueError, match=r"inputs.advantage is \[7\]"):
        call(inputs=TokenInputs(advantage=torch.ones(T + 1)))
    with pytest.raises(ValueError, match="needs inputs.advantage"):
        call(loss="grpo")
    with pytest.raises(ValueError, match="unknown loss 'nope'"):
        call(loss="nope")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_live_token_is_seen(value):
    """A NaN hidden state of a live token makes its loss and the gradients NaN: never silently dropped."""
    hidden, weight = torch.randn(T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    with torch.no_grad():
        hidden[3] = value
    out = call(hidden=hidden, weight=weight, plan=Plan(chunk_tokens=2))
    out.loss_sum.backward()
    assert out.loss_sum.isnan() and hidden.grad[3].isnan().any() and weight.grad.isnan().any()
    assert hidden.grad[:2].isfinite().all()


def test_integer_types_and_misaligned_memory():
    """int32 labels; hidden states and a head that begin between 16-byte boundaries, an odd vocabulary, an odd H."""
    store, labels = torch.randn(1 + T * 7 + 23 * 7), torch.randint(0, 23, (T,), dtype=torch.int32)
    hidden, weight = store[1 : 1 + T * 7].view(T, 7), store[1 + T * 7 :].view(23, 7)
    logp = call("stats", hidden=hidden, weight=weight, labels=labels, plan=Plan(chunk_tokens=4)).logp
    truth = (hidden @ weight.t()).log_softmax(-1).gather(1, labels.long()[:, None])[:, 0]
    torch.testing.assert_close(logp, truth)
