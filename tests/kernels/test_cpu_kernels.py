"""The C++ row kernels: every instruction set against the fp64 oracle; threads, forks, memory that must not be read."""

import ctypes
import mmap
import multiprocessing
import warnings

import pytest
import torch

from megatron_plugin.kernels import backend, cpu, shard_ops
from megatron_plugin.kernels.layout import Shard
from megatron_plugin.kernels.partials import finish_rows, merge_partials
from megatron_plugin.kernels.reference import grad_reference, token_stats_reference
from tests import tolerances as tol
from tests.kernels.cases import KINDS, rows, run

# 1; 7: less than a vector; 257: vectors and one column; 50257: GPT-2, rows off every boundary; 151936: Qwen, three parts; 262144: Gemma, four
VOCABULARIES = (1, 7, 257, 50257, 151936, 262144)
OUR_BOUND = {torch.float32: (tol.GRAD_FP32, tol.GRAD_FP32), torch.bfloat16: tol.GRAD_BF16, torch.float16: tol.GRAD_FP16}


@pytest.fixture(params=cpu.ISAS)
def isa(request):
    if request.param not in cpu.supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu.use_isa(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Four threads, whatever the machine: more than rows, and a row is cut between them."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


def _check(logits, labels, grads, **where):
    stats, grad = run("cpp", logits, labels, grads, **where)
    logp, entropy, lse = token_stats_reference(logits, labels, **where)
    assert ((stats.logp.double() - logp).abs() <= tol.LOGP_FP32 + tol.LOGP_FP32_RELATIVE * logp.abs()).all()
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=tol.ENTROPY_FP32, rtol=0)
    torch.testing.assert_close(stats.lse.double(), lse, atol=tol.LOGP_FP32, rtol=2.0**-23)
    atol, rtol = OUR_BOUND[logits.dtype]
    torch.testing.assert_close(grad.double(), grad_reference(logits, labels, grads, **where), atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_every_instruction_set_matches_the_oracle(isa, dtype, V):
    logits, labels, grads = rows("normal", 3, V).to(dtype), torch.randint(0, V, (3,)), torch.randn(3, 3)
    _check(logits, labels, grads)
    _check(logits, labels, grads, temperature=0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_on_rows_that_break_softmax(isa, kind):
    logits, labels = rows(kind, 3, 5003), torch.tensor([0, 0, 0])
    _check(logits, labels, torch.randn(3, 3))


@pytest.mark.parametrize("top", [0.0, 1.0, 12.0])
def test_equal_logits_do_not_add_up_their_rounding(isa, top):
    """Each addition of one and the same number rounds the same way: a single fp32 accumulator per lane would be off by 1e-5 or more."""
    logits = torch.zeros(1, 262144)
    logits[0, 77] = top
    _check(logits, torch.tensor([77]), torch.ones(1, 3))


@pytest.mark.parametrize("column", [0, 300, 5002])  # the first block, a later one, the columns after the last whole vector
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_logit_spoils_the_row(isa, column, value):
    for dtype in cpu.DTYPES:
        logits, labels = torch.randn(2, 5003).to(dtype), torch.tensor([7, 7])
        logits[1, column] = value
        stats, grad = run("cpp", logits, labels, torch.ones(2, 3))
        for x in stats:
            assert x[0].isfinite()
        assert stats.logp[1].isnan() and stats.entropy[1].isnan() and grad[1].isnan().any() and grad[0].isfinite().all()


def test_columns_at_minus_infinity_get_exactly_no_gradient(isa):
    logits, labels = torch.randn(2, 5003), torch.tensor([7, 7])
    logits[:, 1000:4000] = -torch.inf
    _, grad = run("cpp", logits, labels, torch.ones(2, 3))
    assert not grad[:, 1000:4000].any() and (grad[:, :1000] != 0).all()


@pytest.mark.parametrize("out_dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_the_gradient_may_have_another_dtype(isa, dtype, out_dtype):
    """fp32 logits -> bf16 gradient halves what the backward GEMMs of the hidden-in op read; rounded once, as torch rounds."""
    logits, labels, grads = torch.randn(5, 1003).to(dtype), torch.tensor([0, -100, 1002, 500, 3]), torch.randn(5, 3)
    grads[3] = 0.0
    shard = Shard(0, 1000, -100, 1.0)
    labels[2] = 999
    *_, state = finish_rows(merge_partials(cpu.stats_cpp(logits, labels, shard)[None]), labels, shard, torch.float32)
    exact, out = torch.empty(5, 1003), torch.full((5, 1003), torch.nan, dtype=out_dtype)
    cpu.grad_cpp(logits, exact, labels, state, grads, shard)
    cpu.grad_cpp(logits, out, labels, state, grads, shard)
    assert torch.equal(out, exact.to(out_dtype))
    assert not out[[1, 3]].any() and not out[:, 1000:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_is_exact(isa, dtype):
    """Every 16-bit pattern whose exponential is finite, half's denormals too: e^x comes out (m2 = 0, s = 1, a = b = 0, c = 1)."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = every[every.abs() < 80][None]
    out, label = torch.empty(logits.shape), torch.tensor([10**6])
    cpu.grad_cpp(logits, out, label, torch.tensor([[0.0, 1.0, -1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]]), Shard(0, 10**7, -100, 1.0))
    torch.testing.assert_close(out.double(), logits.double().exp(), rtol=8e-6, atol=0)  # 80 log2e rounded once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_that_of_torch(isa, dtype):
    """A row of zeros with m2 = 0, s = 1, a = b = 0 has the gradient c: ties, neighbours of ties, denormals, overflow, infinity, NaN."""
    every = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32).to(torch.int16).view(dtype).float()
    half_way = (every[:-1] + every[1:]) / 2
    edges = torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 1e30, 3.3961e38, torch.inf, torch.nan])
    c = torch.cat([every, half_way, half_way.nextafter(torch.tensor(9e9)), half_way.nextafter(torch.tensor(-9e9)), edges, -edges])
    c = c[(c.abs() >= 2.0**-126) | c.isnan()] if dtype == torch.bfloat16 else c[c != 0]  # AVX512-BF16 flushes fp32's denormals
    T, logits = len(c), torch.zeros(len(c), 17)
    state, grads = torch.tensor([[0.0, 1.0, -1.0, 0.0]]).expand(T, 4), torch.zeros(T, 3)
    grads[:, 2] = c
    out, labels = torch.empty(T, 17, dtype=dtype), torch.full((T,), 20)
    cpu.grad_cpp(logits, out, labels, state, grads, Shard(0, 99, -100, 1.0))
    torch.testing.assert_close(out, c.to(dtype)[:, None].expand(T, 17), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("T", [0, 1, 3])
def test_fewer_rows_than_threads(isa, threads, T):
    V = 151936
    logits, labels, grads = torch.randn(T, V), torch.randint(0, V, (T,)), torch.randn(T, 3)
    _check(logits, labels, grads)
    many = run("cpp", logits, labels, grads)
    torch.set_num_threads(1)
    one = run("cpp", logits, labels, grads)
    assert all(torch.equal(x, y) for x, y in zip((*many[0], many[1]), (*one[0], one[1]), strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    """The same bits alone and in a batch: parts have fixed borders."""
    logits, labels, grads = torch.randn(5, 151936), torch.randint(0, 151936, (5,)), torch.randn(5, 3)
    stats, grad = run("cpp", logits, labels, grads)
    alone, alone_grad = run("cpp", logits[3:4], labels[3:4], grads[3:4])
    assert torch.equal(alone.logp, stats.logp[3:4]) and torch.equal(alone.entropy, stats.entropy[3:4]) and torch.equal(alone_grad, grad[3:4])


def _rows_that_cannot_be_read(dtype):
    """Three rows of one page each, of which the second is masked and the third has no upstream gradient; reading those kills this process."""
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    rows_of_a_page = torch.frombuffer(memory, dtype=dtype).view(3, -1)
    rows_of_a_page[0] = torch.randn(rows_of_a_page.shape[1])
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(rows_of_a_page[1].data_ptr()), 2 * mmap.PAGESIZE, 0) == 0
    V = rows_of_a_page.shape[1]
    shard, labels, grads = Shard(0, V, -100, 1.0), torch.tensor([3, -100, 3]), torch.ones(3, 3)
    partials = cpu.stats_cpp(rows_of_a_page[:2], labels[:2], shard)
    assert partials[0].isfinite().all() and partials[1].tolist() == [0, 1, 0, 0]
    grads[2], out = 0.0, torch.full((3, V), torch.nan)
    cpu.grad_cpp(rows_of_a_page, out, labels, torch.ones(3, 4), grads, shard)
    assert out[0].isfinite().all() and not out[1:].any()


def test_rows_without_gradient_are_not_read(isa):
    """In a child, which a wrong read kills."""
    for dtype in cpu.DTYPES:
        child = multiprocessing.get_context("fork").Process(target=_rows_that_cannot_be_read, args=(dtype,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        child.join(20)
        assert child.exitcode == 0


def test_a_shard_without_columns_of_the_vocabulary():
    shard, labels = Shard(300, 300, -100, 1.0), torch.tensor([5, -100])
    partials = cpu.stats_cpp(torch.full((2, 40), torch.nan), labels, shard)
    assert torch.equal(partials[:, 1], torch.tensor([0.0, 1.0])) and partials[0, 3] == -torch.inf and partials[0, 0] == -(2.0**31)
    out = torch.full((2, 40), torch.nan)
    cpu.grad_cpp(torch.full((2, 40), torch.nan), out, labels, torch.ones(2, 4), torch.ones(2, 3), shard)
    assert not out.any()


def test_a_stray_label_raises_as_in_eager():
    with pytest.raises(ValueError, match=r"label 300 at row 1 is outside the vocabulary \[0, 300\) and is not ignore_index=-100"):
        cpu.stats_cpp(torch.randn(2, 300), torch.tensor([-100, 300]), Shard(0, 300, -100, 1.0))


def test_what_the_kernels_cannot_take_is_refused():
    shard, labels = Shard(0, 9, -100, 1.0), torch.tensor([0])
    with pytest.raises(ValueError, match=r"got torch.float64 logits on cpu; it takes fp32, bf16 and fp16 on the CPU"):
        cpu.stats_cpp(torch.randn(1, 9).double(), labels, shard)
    with pytest.raises(ValueError, match="'sse9' is not to be had here; choose one of portable"), cpu.use_isa("sse9"):
        pass


def test_the_choice_of_backend():
    z = torch.randn(2, 9)
    assert [backend.select(z.to(d)) for d in (*cpu.DTYPES, torch.float64)] == ["cpp", "cpp", "cpp", "eager"]


def _stats_in_child(logits, labels, queue):
    queue.put(shard_ops.stats(logits, labels, 0, 50257, -100, 1.0).tolist())


def test_a_forked_process_does_not_wait_for_threads_it_does_not_have(threads):
    """OpenMP's pool is not copied by fork: without care, the first parallel region of the child never ends."""
    logits, labels = torch.randn(4, 50257), torch.zeros(4, dtype=torch.int64)
    assert cpu.threads(logits.numel()) > 1
    expected = shard_ops.stats(logits, labels, 0, 50257, -100, 1.0).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_stats_in_child, args=(logits, labels, queue))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process with threads
        child.start()
    child.join(20)
    hung = child.is_alive()
    child.kill()
    assert not hung and queue.get(timeout=5) == expected
