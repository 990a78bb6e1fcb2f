"""What the rank processes of tests/parallel run.  Every function takes the process group first and returns plain tensors."""

import torch
import torch.distributed as dist

from megatron_plugin import TokenInputs, token_loss, token_stats
from megatron_plugin.kernels.backend import use_backend


def shard_results(group, *, logits, labels, bounds, grads, vocab_size=None, backend="auto"):
    """token_stats on this rank's columns [bounds[r], bounds[r + 1]): (logp, entropy, lse, gradient of its columns)."""
    rank = dist.get_rank(group)
    shard = logits[:, bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
    equal = len({b - a for a, b in zip(bounds, bounds[1:], strict=False)}) == 1
    where = dict(vocab_size=vocab_size) if equal else dict(vocab_start=bounds[rank], vocab_size=vocab_size or bounds[-1])
    with use_backend(backend):
        stats = token_stats(shard, labels, tp_group=group, **where)
        (grad,) = torch.autograd.grad(stats, shard, tuple(grads.to(stats.logp.dtype).unbind(1)))
    return tuple(x.detach() for x in stats) + (grad,)


def loss_results(group, *, logits, labels, loss, params, inputs, vocab_size, backend="auto"):
    """token_loss on an equal split: (loss, gradient of this rank's columns, metric sums)."""
    from megatron_plugin import bind

    shard = logits.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].clone().requires_grad_()
    with use_backend(backend):
        out = token_loss(shard, labels, bind(loss, **params), inputs=TokenInputs(**inputs), tp_group=group, vocab_size=vocab_size)
    out.loss_sum.backward()
    return out.loss_sum.detach(), shard.grad, {k: float(v) for k, v in out.metric_sums.items()}


def collectives(group, *, logits, labels):
    """How many collectives a forward and a backward make: (forward, backward), counted at the c10d entry points."""
    calls, originals = [], {}
    names = [n for n in dir(dist) if n.startswith(("all_", "reduce", "broadcast", "gather", "scatter")) and callable(getattr(dist, n))]
    for name in names:
        originals[name] = getattr(dist, name)
        setattr(dist, name, lambda *a, _f=originals[name], _n=name, **k: (calls.append((_n, a[0].numel())), _f(*a, **k))[1])
    try:
        shard = logits.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].clone().requires_grad_()
        stats = token_stats(shard, labels, tp_group=group)
        forward = list(calls)
        (stats.logp + stats.entropy).sum().backward()
        return forward, calls[len(forward) :]
    finally:
        for name, f in originals.items():
            setattr(dist, name, f)


def error_of(group, *, columns, vocab_start, vocab_size):
    """The error message of an impossible vocabulary, or None."""
    rank = dist.get_rank(group)
    start = None if vocab_start is None else vocab_start[rank]
    try:
        token_stats(torch.randn(2, columns), torch.tensor([0, 1]), tp_group=group, vocab_start=start, vocab_size=vocab_size)
    except ValueError as error:
        return str(error)


def error_of_uneven(group, *, columns):
    """The error message when ranks hold different numbers of columns and say nothing about it."""
    return error_of(group, columns=columns[dist.get_rank(group)], vocab_start=None, vocab_size=None)


def step_gradient(group, *, micro_batches, weight, expert, rollout, loss, two_sources):
    """One optimiser step as megatron-core does it: sum of (loss_sum, num_tokens) over ranks and micro-batches, one division.

    micro_batches[rank] is a list of dicts(hidden, labels, mask, expert, lengths).  Returns (gradient of the head, objective).
    """
    from megatron_plugin.parallel.normaliser import StepMask, coefficients, count_step

    head = weight.clone().requires_grad_()
    mine = micro_batches[dist.get_rank(group)]
    masks = [StepMask(m["mask"], m["expert"] if two_sources else None, m["lengths"]) for m in mine]
    counts = count_step(masks, group)
    total, tokens = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for m, mask in zip(mine, masks, strict=True):
        coefficient = coefficients(mask, counts, expert=expert, rollout=rollout)
        out = token_loss(m["hidden"] @ head.T, m["labels"], loss, inputs=TokenInputs(coefficient=coefficient))
        out.loss_sum.backward()
        total, tokens = total + out.loss_sum.detach(), tokens + out.num_tokens
    gradient = torch.zeros_like(head) if head.grad is None else head.grad
    for x in (gradient, total, tokens):
        dist.all_reduce(x, group=group)
    return gradient / tokens.clamp(min=1), total / tokens.clamp(min=1)


def readme_loss_func(group, *, source, logits, labels, loss_mask):
    """Run the README's loss_func as written, on megatron-core's own TP2 x DP2 groups: (loss_sum, num_tokens, report)."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    try:
        namespace = {}
        exec(source, namespace)
        shard = logits.chunk(2, -1)[parallel_state.get_tensor_model_parallel_rank()]
        loss_sum, num_tokens, report = namespace["loss_func"](labels, loss_mask, shard)
        return float(loss_sum), int(num_tokens), {k: v.tolist() for k, v in report.items()}
    finally:
        parallel_state.destroy_model_parallel()
