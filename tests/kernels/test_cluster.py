"""The cluster kernel: its source run thread by thread on the CPU (emulated_hopper.h), and on the GPU where there is a Hopper one.

The emulation is held to the same oracle as every backend, in adversarial orders; that it would see a missing barrier is tested, too.
"""

import math
import shutil

import pytest
import torch

from megatron_plugin import LOSSES, TokenInputs, bind, token_loss
from megatron_plugin.kernels import build, cluster
from megatron_plugin.kernels.backend import use_backend
from megatron_plugin.kernels.layout import Shard, empty_like_rows
from megatron_plugin.kernels.objective import COLUMNS
from megatron_plugin.kernels.row_loss import row_loss
from megatron_plugin.kernels.token_stats import one_shard
from megatron_plugin.kernels.twin_cuda import translate
from megatron_plugin.losses.contract import TokenLoss
from megatron_plugin.losses.objective import objective_of
from tests import tolerances as tol
from tests.kernels import emulated_cluster as emulated
from tests.kernels import test_token_loss as shared

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SHARED_LIMIT, MULTIPROCESSOR = 227 * 1024, 228 * 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def hopper(monkeypatch):
    """The device on which backend 'cluster' runs: the GPU, or the CPU with the emulated kernel."""
    if HOPPER:
        yield torch.device("cuda")
    else:
        with emulated.no_gpu(monkeypatch):
            yield torch.device("cpu")


# ---- the op, as every other backend (test_token_loss.py) ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", sorted(name for name, loss in LOSSES.items() if loss.twin))
@pytest.mark.parametrize("regularised", [False, True], ids=["plain", "regularised"])
def test_every_loss_matches_the_oracle(loss, regularised, hopper):
    shared.test_every_loss_matches_the_oracle("cluster", loss, regularised, hopper)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", shared.VOCABULARIES)
@pytest.mark.parametrize("kind", ["normal", "peaked", "offset", "masked_columns", "rising"])
def test_every_kind_of_row(dtype, V, kind, hopper):
    shared.test_every_kind_of_row("cluster", dtype, V, kind, hopper)


@pytest.mark.parametrize("V, stride, lead", [(257, 264, 3), (4099, 4099, 5)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_any_stride_and_alignment(V, stride, lead, overwrite, hopper):
    shared.test_any_stride_and_alignment("cluster", V, stride, lead, overwrite, hopper)


@pytest.mark.parametrize("loss", ["luffy", "grpo"])
def test_nan_in_a_live_row_is_never_hidden(loss, hopper):
    shared.test_nan_in_a_live_row_is_never_hidden("cluster", loss, hopper)


def test_the_range_of_the_logits(hopper):
    shared.test_the_range_of_the_logits_in_one_pass("cluster", hopper)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_masked_row_beats_every_check(poison, hopper):
    shared.test_a_masked_row_beats_every_check("cluster", poison, hopper)


@pytest.mark.parametrize("T", [0, 1])
def test_no_tokens_and_one_token(T, hopper):
    shared.test_no_tokens_and_one_token("cluster", T, hopper)


def test_parameters_as_tensors(hopper):
    shared.test_parameters_as_tensors("cluster", hopper)


def test_the_upstream_scalar_reaches_the_gradient(hopper):
    shared.test_the_upstream_scalar_reaches_the_gradient("cluster", 0.125, hopper)


def test_evaluation_writes_nothing(hopper):
    shared.test_evaluation_writes_nothing("cluster", hopper)


def test_a_users_own_twin(hopper):
    logits, labels = torch.randn(4, 300), torch.randint(0, 300, (4,))
    truth, grad_truth = shared._oracle(bind(shared.quartic, scale=3.0), logits, labels, {})
    z = logits.to(hopper).requires_grad_()
    with use_backend("cluster"):
        out = token_loss(z, labels.to(hopper), bind(TokenLoss(shared.quartic, twin=shared.quartic_twin), scale=3.0))
    out.loss_sum.backward()
    shared._check(out, z.grad, truth, grad_truth)


# ---- what only the kernel can be asked ---------------------------------------------------------------------------------------------


def _objective(loss, T: int, device, inputs: TokenInputs | None = None):
    inputs = inputs or TokenInputs(advantage=torch.linspace(-1, 2, T, device=device))
    return objective_of(bind(loss, entropy_bonus=0.05), inputs)[0]


def _row_loss(logits, labels, shard, loss="grpo", inputs=None, backend="cluster"):
    """(table, gradient) of one call; the gradient starts as 777."""
    out = empty_like_rows(logits).fill_(777.0)
    with use_backend(backend):
        return row_loss(logits, out, labels, shard, _objective(loss, len(labels), logits.device, inputs)), out


@pytest.mark.parametrize("loss", ["luffy", "grpo", "srft_demo"])
def test_a_stray_label_is_nan(loss, hopper):
    logits, labels = torch.randn(3, 300, device=hopper), torch.tensor([5, 300, -1], device=hopper)
    inputs = TokenInputs(advantage=torch.ones(3, device=hopper), old_logp=-torch.ones(3, device=hopper))
    table, grad = _row_loss(logits, labels, Shard(0, 300, -100, 1.0), loss, inputs)
    assert table[0].isnan().tolist() == [False, True, True] and grad[0].isfinite().all() and grad[1:].isnan().all()


def test_infinite_labels_and_rows(hopper):
    """-inf at the label; a row of -inf is NaN, also in fp16 and bf16, whose packed maximum drops NaN."""
    for dtype in DTYPES:
        logits = torch.randn(3, 5003, device=hopper).to(dtype)
        logits[0, 7], logits[2] = -math.inf, -math.inf
        table, grad = _row_loss(logits, torch.tensor([7, 7, 7], device=hopper), Shard(0, 5003, -100, 1.0), "dft")
        assert table[2, 0] == -math.inf and table[2, 1].isfinite() and table[2, 2].isnan()
        assert grad[:2].isfinite().all() and grad[2].isnan().any()


def test_a_row_without_a_push_is_zero(hopper):
    """a = b = c = 0 though the label is live; the row behind it is then loaded in one go.  A NaN is no reason to be silent."""
    logits, labels = torch.randn(5, 5003, device=hopper), torch.tensor([7, 9, 9, 9, 9], device=hopper)
    logits[2, 3] = math.nan
    inputs = TokenInputs(coefficient=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], device=hopper))
    _, grad = _row_loss(logits, labels, Shard(0, 5003, -100, 1.0), "sft", inputs)
    assert not grad[1].any() and grad[2].isnan().any() and grad[[0, 3, 4]].isfinite().all() and grad[[0, 3, 4]].any(1).all()


@pytest.mark.parametrize("blocks", cluster.CLUSTERS)
@pytest.mark.parametrize("dtype, V, stride, lead", [
    (torch.bfloat16, 1, 1, 0),              # no whole vector
    (torch.bfloat16, 20, 23, 5),            # fewer vectors than blocks
    (torch.bfloat16, 50257, 50257, 3),      # GPT-2: every row starts elsewhere between boundaries
    (torch.float16, 9001, 9008, 0),         # padded rows
    (torch.float32, 33001, 33001, 1),       # several tiles per block, none of them whole
    (torch.bfloat16, 32768, 32768, 0),      # whole tiles only
])  # fmt: skip
def test_every_cluster_size_reads_and_writes_each_column_once(blocks, dtype, V, stride, lead, hopper, monkeypatch):
    """The numbers on any device; the counts, and that nothing outside the rows is touched, in the emulation."""
    T, vocab_size = 5, max(1, V - 2)
    monkeypatch.setattr(cluster, "plan", lambda columns, size: cluster.Plan.cut(columns, size, blocks))
    buffer = (torch.randn(lead + T * stride + 9) * 3).to(dtype).to(hopper)
    logits = buffer.as_strided((T, V), (stride, 1), lead)
    labels = torch.tensor([0, vocab_size - 1, -100, vocab_size // 2, vocab_size // 3]).to(hopper)
    shard = Shard(0, vocab_size, -100, 0.7)
    table, grad = _row_loss(logits, labels, shard)
    wide = logits.double() if dtype == torch.float32 else logits.float()
    expected, expected_grad = _row_loss(wide, labels, shard, backend="eager")
    torch.testing.assert_close(table.double(), expected.double(), atol=tol.TERMS, rtol=tol.TERMS)
    bound = 5 * tol.GRAD_FP32 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(grad.double(), expected_grad.double(), atol=bound, rtol=bound)
    if HOPPER:
        return
    twin = _objective("grpo", T, hopper).twin
    launched = emulated.library(dtype, translate(twin.fn, twin.metrics))
    reads, writes = emulated.counts(launched, (T - 1) * stride + V, (T - 1) * grad.stride(0) + V)
    rows_read = torch.from_numpy(reads).as_strided((T, V), (stride, 1))
    live = (labels != -100)[:, None] & (torch.arange(V) < vocab_size)
    assert torch.equal(rows_read, live.to(torch.uint8)) and reads.sum() == live.sum()
    rows_written = torch.from_numpy(writes).as_strided((T, V), (grad.stride(0), 1)).clone()
    assert rows_written.sum() == writes.sum() and (rows_written >= 1).all()
    assert rows_written.sum() <= T * V + 4  # the label's column may be written twice, by one thread


# ---- the emulation as an adversary ---------------------------------------------------------------------------------------------------

ROWS, COLUMNS_ODD = 9, 70001  # more rows than clusters, whole and broken tiles, live rows behind masked ones


def _problem():
    buffer = (torch.randn(3 + ROWS * COLUMNS_ODD) * 3).bfloat16()
    logits, labels = buffer[3:].view(ROWS, COLUMNS_ODD), torch.randint(0, COLUMNS_ODD - 3, (ROWS,))
    labels[3:5] = -100
    logits[5, 100] = -math.inf
    logits[6, 200] = math.nan
    return logits, labels, Shard(0, COLUMNS_ODD - 3, -100, 1.0)


def _emulate(kernel: cluster.Library, problem, blocks: int = 4, **how) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels, shard = problem
    objective = _objective("grpo", ROWS, "cpu")
    emulated.setup(kernel, **how)
    out, table = empty_like_rows(logits).fill_(777.0), torch.full((len(COLUMNS) + 2, ROWS), 777.0)
    plan = cluster.Plan.cut(shard.columns(logits), 2, blocks)
    kernel.launch(cluster._job(logits, out, labels, table, *cluster._operands(objective, logits.device), shard, plan), 0, plan, 0)
    return table, out


def _same(one, two) -> bool:
    return all(torch.equal(x.nan_to_num(-55.0), y.nan_to_num(-55.0)) for x, y in zip(one, two, strict=True))


def _grpo(csrc=build.CSRC) -> cluster.Library:
    twin = _objective("grpo", ROWS, "cpu").twin
    return emulated.library(torch.bfloat16, translate(twin.fn, twin.metrics), csrc)


@pytest.mark.parametrize("landing", emulated.LANDINGS)
@pytest.mark.parametrize("blocks", [1, 4, 16])
def test_the_order_of_threads_and_copies_changes_no_bit(landing, blocks):
    problem = _problem()
    first = _emulate(_grpo(), problem, blocks)
    for seed in range(6 if blocks < 16 else 3):
        assert _same(_emulate(_grpo(), problem, blocks, seed=seed, landing=landing, clusters=1 + seed % 3), first)


MUTANTS = {
    "a tile is refilled while a warp still reads it": ("block_sync();\n                    if (thread == 0) load_tile", "if (thread == 0) load_tile"),
    "the same behind a masked row": ("block_sync();  // a slower warp", "// a slower warp"),
    "one inbox for all rows": ("mail->inbox + turn * blocks", "mail->inbox"),
    "a tile is read before it landed": ("barrier_wait(mail->full + tile, parity);\n        uint4 v[UNROLL]", "uint4 v[UNROLL]"),
    "the broken tile is read before it landed": ("for (int tile = whole; tile < tiles; ++tile) barrier_wait(mail->full + tile, parity);", ""),
    "the phase of a barrier is not counted": ("read_slice(slice, data, mail, turn,", "read_slice(slice, data, mail, 0,"),
    "the label's column is another thread's": ("/ VECTOR % THREADS == thread ?", "/ VECTOR % THREADS == (thread ^ 255) ?"),
    "no cluster barrier behind the exchange": ("cluster_sync();\n    return warp == 0", "return warp == 0"),
    "the verdict is read before it is there": ("block_sync();\n            const Verdict g", "const Verdict g"),
    "the warps' sums are read before they are there": ("mail->part[warp] = p;\n    block_sync();", "mail->part[warp] = p;"),
    "a block is written to that has not begun": ("cluster_sync();  // every block", "block_sync();  // every block"),
    "NaN is dropped": ("y = floor_nan(fmaf(x[j], scale2, -m2)), e", "y = fmaxf(fmaf(x[j], scale2, -m2), FLOOR), e"),
    "-inf is not floored": ("y = floor_nan(fmaf(x[j], scale2, -m2)), e", "y = fmaf(x[j], scale2, -m2), e"),
    "padding is left as it was": ("write_zeros<E>(out + job.valid * sizeof(Bits), job.width - job.valid, rank, blocks);", ""),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_emulation_sees_a_planted_fault(fault, tmp_path):
    before, after = MUTANTS[fault]
    shutil.copytree(build.CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc/cluster_loss.cu"
    assert source.read_text().count(before) == 1
    source.write_text(source.read_text().replace(before, after))
    problem, mutant = _problem(), _grpo(tmp_path / "csrc")
    right = _emulate(_grpo(), problem)

    def survives(seed: int, landing: str) -> bool:
        try:
            return _same(_emulate(mutant, problem, seed=seed, landing=landing), right)
        except RuntimeError:  # deadlock, or a store into a block that does not run
            return False

    assert not all(survives(seed, landing) for seed in range(10) for landing in emulated.LANDINGS)


# ---- plans and errors ----------------------------------------------------------------------------------------------------------------

# V: blocks per row in bf16, in fp32
PLANS = {32768: (1, 2), 50257: (1, 2), 131072: (4, 8), 151936: (4, 8), 262144: (8, 16)}


@pytest.mark.parametrize("V", PLANS)
def test_two_blocks_fit_a_multiprocessor(V):
    for element_size, blocks in zip((2, 4), PLANS[V], strict=True):
        plan = cluster.plan(V, element_size)
        assert plan.cluster == blocks and plan.slice_vectors * blocks * 16 >= V * element_size // 16 * 16
        assert plan.shared_bytes <= SHARED_LIMIT and 2 * (plan.shared_bytes + 1024) <= MULTIPROCESSOR
        assert plan.slice_vectors <= 16 * 1024  # MAX_TILES tiles of 1024 vectors


def test_a_row_that_no_cluster_holds_is_an_error():
    assert cluster.plan(16 * 100_000, 2) == cluster.Plan.cut(16 * 100_000, 2, 16)
    with pytest.raises(ValueError, match="rows of 2000000 columns, 2 bytes each; 16 blocks hold 3632 KiB: use backend 'triton'"):
        cluster.plan(2_000_000, 2)


def _ask(logits, loss="sft", *, out=None, gather=one_shard):
    objective, _ = objective_of(bind(loss), TokenInputs())
    with use_backend("cluster"):
        row_loss(logits, out, torch.zeros(len(logits), dtype=torch.int64), Shard(0, logits.shape[1], -100, 1.0), objective, gather)


def test_a_cpu_tensor_is_an_error():
    with pytest.raises(ValueError, match="got logits on the cpu, expected a GPU of compute capability 9.0.*use backend 'triton'"):
        _ask(torch.randn(3, 50))


def test_what_the_kernel_cannot_do_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr(cluster, "_check_device", lambda logits: None)
    z = torch.randn(3, 50)
    for match, call in {
        "a vocabulary split over ranks": dict(gather=lambda partials: partials[None]),
        "a loss without a twin": dict(loss=shared.quartic),
        "float32 logits with a gradient in torch.bfloat16": dict(out=z.bfloat16()),
        "a gradient whose rows lie otherwise": dict(out=torch.empty(3, 52)[:, 1:51]),
    }.items():
        with pytest.raises(ValueError, match=f"backend 'cluster' got .*{match}.*use backend 'triton'"):
            _ask(z, **call)
    with pytest.raises(ValueError, match="got torch.float64 logits"):
        _ask(z.double())


def test_without_nvcc_the_error_says_so(monkeypatch):
    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs nvcc .*use backend 'triton'"):
        cluster._nvcc()


def test_a_fake_tensor_gets_the_shape_of_the_table():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        z = torch.empty(6, 77, dtype=torch.bfloat16)
        table = torch.ops.megatron_plugin.cluster_loss(z, None, torch.zeros(6, dtype=torch.int64), [], [], [], "", 2, 0, 77, -100, 1.0)
    assert table.shape == (len(COLUMNS) + 2, 6) and table.dtype == torch.float32
