"""Triton kernel of the one-pass op: statistics, token weight, loss terms, metrics and the gradient of a row in one program.

The vocabulary on one rank: one launch reads a row, weighs it and writes its gradient; the second read finds part of the row in cache.
Split over ranks: the stats kernel runs first, one all-gather joins the ranks, and this kernel merges, weighs and writes.
T tokens, V columns of this shard, R ranks, C columns of the table (objective.COLUMNS and the loss's own metrics).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_plugin.kernels import grad
from megatron_plugin.kernels.grad import gradient_scalars, write_gradient
from megatron_plugin.kernels.layout import KernelCall, Shard, aligned_rows, shared_vector, vector_width
from megatron_plugin.kernels.objective import COLUMNS, INPUTS, MAX_PARAMS, Number, Objective, empty_table
from megatron_plugin.kernels.row import FAR, LN2
from megatron_plugin.kernels.stats import row_partials

# Wide programs for the one launch that reads its row twice, so that few rows are open: one program of 16 warps fits an SM, and 132 rows of
# 300 KB (bf16, Qwen's vocabulary) are 40 MB, which a 50 MB cache may keep for the second read; with 4 warps 16 times as many rows would be
# open.  maxnreg: without it ptxas squeezes some variants into 64 registers and spills.  Not measured on a GPU yet.
BLOCK = 16384
LAUNCH = dict(num_warps=16, maxnreg=128)
NUM_STAGES = 3


@triton.jit
def _number(p):
    """A parameter: a run-time scalar, or a pointer to one."""
    p = tl.to_tensor(p)
    if p.dtype.is_ptr():
        return tl.load(p).to(tl.float32)
    else:
        return p.to(tl.float32)


@triton.jit
def _input(P, row, live, default):
    """Input of one token; `default` where the caller has none."""
    if P is None:
        return default
    else:
        return tl.load(P + row, mask=live, other=0).to(tl.float32)


@triton.jit
def _merge(PARTIALS, row, ranks, stride_rank, RANKS: tl.constexpr):
    """Partials of one token over all ranks, [R, T, 4]: the same order and bits on every rank.  t in nats."""
    r = tl.arange(0, RANKS)
    p = PARTIALS + r * stride_rank + row * 4
    there = r < ranks
    m2_r = tl.load(p, mask=there, other=-float("inf"))
    s_r = tl.load(p + 1, mask=there, other=0.0)
    t_r = tl.load(p + 2, mask=there, other=0.0)
    z_r = tl.load(p + 3, mask=there, other=-float("inf"))
    m2 = tl.max(m2_r, 0)
    shift = tl.maximum(m2_r - m2, -1000.0)
    rescale = tl.exp2(shift)
    return m2, tl.sum(s_r * rescale, 0), tl.sum((t_r + shift * LN2 * s_r) * rescale, 0), tl.max(z_r, 0)


@triton.jit
def loss_kernel(
    X, DX, LABELS, PARTIALS, TABLE,                    # [T, V], its gradient (may be X), [T], [R, T, 4] or None, [C, T]
    COEF, ADV, OLD, ROLL, REF, EXPERT,                 # [T] or None
    grad_scale, p0, p1, p2, p3, p4, p5, p6, p7, entropy_bonus, z_loss,
    stride, stride_dx, lead, T, V, valid, vocab_start, vocab_size, ignore_index, scale2, inv_temperature, ranks, stride_rank,
    TWIN: tl.constexpr, METRICS: tl.constexpr, FIRST_METRIC: tl.constexpr, RANKS: tl.constexpr, WRITE: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """Fill TABLE[:, row] and, if WRITE, the gradient of the row.  A masked row is not read; its table and gradient are 0."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    live = label != ignore_index
    first = row * stride + lead
    y = label - vocab_start
    if PARTIALS is None:
        m2, s, t2, z = row_partials(X, first, tl.where(live, valid, 0), y, scale2, VEC, BLOCK, STAGES)
        t = t2 * LN2
    else:
        m2, s, t, z = _merge(PARTIALS, row, ranks, stride_rank, RANKS)
    s = tl.where(live, tl.where(tl.abs(m2) >= FAR, float("nan"), s), 1.0)
    log2_s = tl.log2(s)
    logp = tl.where(live, LN2 * (tl.fma(z, scale2, -m2) - log2_s), 0.0)
    logp = tl.where(live & ((label < 0) | (label >= vocab_size)), float("nan"), logp)
    entropy = LN2 * log2_s - t / s
    entropy = tl.where(live, tl.where(entropy < 0.0, 0.0, entropy), 0.0)
    lse = tl.where(live, LN2 * (m2 + log2_s), 0.0)

    coef = _input(COEF, row, live, 1.0)
    terms = TWIN(
        logp, entropy, lse, coef, _input(ADV, row, live, 1.0), _input(OLD, row, live, logp), _input(ROLL, row, live, logp),
        _input(REF, row, live, logp), _input(EXPERT, row, live, 0.0) != 0.0,
        _number(p0), _number(p1), _number(p2), _number(p3), _number(p4), _number(p5), _number(p6), _number(p7),
    )  # fmt: skip
    bonus, z_weight = _number(entropy_bonus), _number(z_loss)
    bonus_term = tl.where(bonus == 0.0, 0.0, -bonus * entropy)
    z_term = tl.where(z_weight == 0.0, 0.0, z_weight * lse * lse)
    loss = terms[0] + bonus_term + z_term
    a = tl.where(logp != logp, logp, terms[1] * coef)  # a clip must not swallow it
    b = (terms[2] - bonus) * coef
    c = (terms[3] + tl.where(z_weight == 0.0, 0.0, 2.0 * z_weight * lse)) * coef
    weight = terms[4] + tl.zeros_like(logp)
    a, b, c = tl.where(live, a, 0.0), tl.where(live, b, 0.0), tl.where(live, c, 0.0)
    reach = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL), tl.abs(c), propagate_nan=tl.PropagateNan.ALL)

    TABLE += row
    tl.store(TABLE, tl.where(live, loss * coef, 0.0))
    tl.store(TABLE + T, tl.where(live, loss, 0.0))
    tl.store(TABLE + 2 * T, logp)
    tl.store(TABLE + 3 * T, entropy)
    tl.store(TABLE + 4 * T, tl.where(live, weight, 0.0))
    tl.store(TABLE + 5 * T, tl.where(live, tl.exp(logp), 0.0))
    tl.store(TABLE + 6 * T, tl.where(live, weight * weight, 0.0))
    tl.store(TABLE + 7 * T, reach)
    tl.store(TABLE + 8 * T, tl.where(live, bonus_term, 0.0))
    tl.store(TABLE + 9 * T, tl.where(live, z_term, 0.0))
    for i in tl.static_range(METRICS):
        tl.store(TABLE + (FIRST_METRIC + i) * T, tl.where(live, terms[5 + i], 0.0))

    if WRITE:
        tl.debug_barrier()  # in place: a warp that is ahead must not write over the label's logit before the last warp has read it
        g = _number(grad_scale)
        a, b, c = a * g, b * g, c * g
        pushes = live & ((a != 0.0) | (b != 0.0) | (c != 0.0))
        A, B, dx_label = gradient_scalars(a, b, c, s, logp, entropy, inv_temperature)
        columns = tl.where(pushes, valid, 0)
        write_gradient(X, DX, first, row * stride_dx + lead, V, columns, y, m2, A, B, dx_label, scale2, VEC, BLOCK, STAGES)


def _pointer(name: str, objective: Objective) -> Tensor | None:
    x = objective.inputs.get(name)
    if x is None:
        return None
    return x.contiguous().view(torch.uint8) if x.dtype == torch.bool else x.contiguous()


def _argument(p: Number, like: Tensor) -> Number:
    """A number as a launch argument: float (an int of 1 would be compiled in), or a pointer to a 0-d fp32 tensor on the GPU."""
    if isinstance(p, Tensor) and p.device == like.device:
        return p.to(torch.float32)
    return float(p)  # a tensor on the CPU is read for nothing; copying it over would wait for the queue


def _configuration(one_pass: bool) -> dict:
    """Block and launch options; one pass over the row wants many rows in flight, as the stats and grad kernels do."""
    if one_pass:
        return dict(BLOCK=grad.BLOCK, STAGES=grad.NUM_STAGES, num_warps=grad.NUM_WARPS)
    return dict(BLOCK=BLOCK, STAGES=NUM_STAGES, **LAUNCH)


def loss_call(
    logits: Tensor, out: Tensor | None, labels: Tensor, shard: Shard, objective: Objective, partials: Tensor | None = None
) -> tuple[KernelCall, Tensor]:
    """The launch of `loss_kernel` and the table [C, T] it fills.

    out: where the gradient goes, `logits` itself or from `empty_like_rows`; None for the values alone.  partials: [R, T, 4] of all ranks
    where the vocabulary is split; None where `logits` hold all of it.
    """
    twin, (T, V), valid = objective.twin, logits.shape, shard.columns(logits)
    table = empty_table(len(COLUMNS) + twin.metrics, T, logits)
    base, lead = aligned_rows(logits)
    base_out = base if out is None else aligned_rows(out)[0]
    number = lambda p: _argument(p, logits)  # noqa: E731
    params = [number(p) for p in twin.params] + [0.0] * (MAX_PARAMS - len(twin.params))
    ranks, stride_rank = (1, 0) if partials is None else (partials.shape[0], partials.stride(0))
    args = (base, base_out, labels, partials, table, *(_pointer(name, objective) for name in INPUTS),
            number(objective.grad_scale), *params, number(objective.entropy_bonus), number(objective.z_loss),
            logits.stride(0), logits.stride(0) if out is None else out.stride(0), lead, T, V, valid, shard.vocab_start, shard.vocab_size,
            shard.ignore_index, shard.scale2(torch.float32), 1.0 / shard.temperature, ranks, stride_rank)  # fmt: skip
    options = dict(TWIN=twin.fn, METRICS=twin.metrics, FIRST_METRIC=len(COLUMNS), RANKS=triton.next_power_of_2(ranks), WRITE=out is not None,
                   VEC=vector_width(logits) if out is None else shared_vector(logits, out), **_configuration(one_pass=partials is not None or out is None))  # fmt: skip
    return KernelCall(loss_kernel, (T,), args, options), table


def loss_triton(
    logits: Tensor, out: Tensor | None, labels: Tensor, shard: Shard, objective: Objective, partials: Tensor | None = None
) -> Tensor:
    """The table [C, T] of the objective's terms; the gradient of sum(coefficient x loss) goes into `out` unless that is None."""
    call, table = loss_call(logits, out, labels, shard, objective, partials)
    call.launch()
    return table
