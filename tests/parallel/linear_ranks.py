"""What the rank processes of test_linear.py run.  Every function takes the process group first and returns plain tensors."""

import torch
import torch.distributed as dist

from megatron_plugin import Head, MainGrad, Plan, TensorParallel, TokenInputs, bind, linear_token_loss, linear_token_stats
from megatron_plugin.kernels import chunks
from megatron_plugin.losses.reduction import evaluate_loss


def _call(group, hidden, weight, labels, *, op, loss, params, inputs, bounds, sequence_parallel, vocab_size, plan, bias=None, main_grad=False):
    rank = dist.get_rank(group)
    mine = slice(bounds[rank], bounds[rank + 1])
    equal = len({b - a for a, b in zip(bounds, bounds[1:], strict=False)}) == 1
    w = torch.nn.Parameter(weight[mine].clone())
    w.main_grad = torch.zeros_like(w, dtype=torch.float32)
    h = (hidden.chunk(dist.get_world_size(group))[rank] if sequence_parallel else hidden).clone().requires_grad_()
    b = None if bias is None else bias[mine].clone().requires_grad_()
    ledger = MainGrad(w) if main_grad else None
    where = dict(
        tp=TensorParallel(group, sequence_parallel, None if equal else bounds[rank]),
        head=Head(b, vocab_size=vocab_size or (None if equal else bounds[-1])),
        plan=Plan(**plan, main_grad=ledger),
    )
    bound = bind(loss, **params)
    if op == "loss":
        out = linear_token_loss(h, w, labels, bound, inputs=TokenInputs(**inputs), **where)
    else:
        given = TokenInputs(**{k: x.reshape(-1) for k, x in inputs.items()})
        live = labels.reshape(-1) != -100
        stats = linear_token_stats(h, w, labels, **where)
        out = evaluate_loss(bound.for_vocabulary(vocab_size or bounds[-1]), type(stats)(*(x.reshape(-1) for x in stats)), given, live)
    return out, h, w, b, ledger


def gradients(group, *, main_grad=False, workspace=None, **call):
    """(loss, tokens, logp [T], dX of this rank, dW of its columns, db).  workspace: instead of the CPU's, for a small case of many chunks."""
    before = chunks.WORKSPACE
    chunks.WORKSPACE = before if workspace is None else {"cpu": workspace, "cuda": workspace}
    try:
        out, h, w, b, ledger = _call(group, **call, main_grad=main_grad)
    finally:
        chunks.WORKSPACE = before
    out.loss_sum.backward()
    if ledger:
        ledger.finalize()
    dw = w.main_grad if main_grad else w.grad
    return out.loss_sum.detach(), int(out.num_tokens), out.per_token.logp.reshape(-1), h.grad, dw, None if b is None else b.grad


def collectives(group, **call):
    """[(name, elements of its result)] of the forward and of the backward, counted at the c10d entry points."""
    calls, originals = [], {}
    names = [n for n in dir(dist) if n.startswith(("all_", "reduce", "broadcast", "gather", "scatter")) and callable(getattr(dist, n))]
    for name in names:
        originals[name] = getattr(dist, name)
        setattr(dist, name, lambda *a, _f=originals[name], _n=name, **k: (calls.append((_n, a[0].numel())), _f(*a, **k))[1])
    try:
        out, *_ = _call(group, **call)
        forward = list(calls)
        out.loss_sum.backward()
        return forward, calls[len(forward) :]
    finally:
        for name, f in originals.items():
            setattr(dist, name, f)


def error(group, **call):
    """The text of the ValueError, or None."""
    try:
        _call(group, **call)
    except ValueError as error:
        return str(error)
