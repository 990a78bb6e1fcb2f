"""Twins translated to C++, compiled for the host and held to autograd of the PyTorch form; and what cannot be translated says so."""

import ctypes
import math
import subprocess

import pytest
import torch
import triton
import triton.language as tl

from megatron_plugin import bind
from megatron_plugin.kernels import weighting
from megatron_plugin.kernels.build import compiler
from megatron_plugin.kernels.objective import INPUTS
from megatron_plugin.kernels.twin_cuda import translate
from megatron_plugin.losses.objective import objective_of
from tests import tolerances as tol
from tests.kernels.test_weighting import VARIANTS, _grid, _torch_form

HALF = tl.constexpr(0.5)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def everything(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    """Every construct there is."""
    x, y = tl.exp(logp), HALF * _clamp(H, 0.25, 1)
    x, y = y, x  # at once, not one after the other
    x += 1 / 8
    low = (logp < -1.0) | ~(H >= 1.0) & (lse != 0)
    off = low ^ expert
    y = tl.where(low, tl.where(off, 1.0, y), -tl.abs(tl.sqrt(y)))
    z = tl.fma(x, y, tl.log2(x + 2)) - tl.log(3.0 + x) + tl.sigmoid(p0)
    off = off & tl.where(expert, low, True)
    return z, low * 2.0, off.to(tl.float32), tl.exp2(-x), +x, low, -float("inf"), coef + adv + old + roll + ref


@pytest.fixture(scope="module")
def compile_twin(tmp_path_factory):
    """translate() -> a function of the twin ABI over tokens: (columns [9, T] fp32, parameters) -> [R, T]."""

    def compile(twin, metrics):
        folder = tmp_path_factory.mktemp("twin")
        loop = (
            'extern "C" void run(int n, const float* x, const float* p, float* out) {\n'
            "    float term[5 + Twin::METRICS];\n    for (int i = 0; i < n; ++i) {\n"
            f"        Twin::terms({', '.join(f'x[{k} * n + i]' for k in range(8))}, x[8 * n + i] != 0, p, term);\n"
            "        for (int k = 0; k < 5 + Twin::METRICS; ++k) out[k * n + i] = term[k];\n    }\n}\n"
        )
        (folder / "twin.cpp").write_text(translate(twin, metrics) + loop)
        subprocess.run([*compiler(), "-O2", "-std=c++17", "-Wall", "-Werror=narrowing", "-shared", "-fPIC", folder / "twin.cpp", "-o", folder / "twin.so"],
                       check=True)  # fmt: skip
        library = ctypes.CDLL(folder / "twin.so")

        def call(columns: torch.Tensor, params) -> torch.Tensor:
            columns = columns.float().contiguous()
            out = torch.full((5 + metrics, columns.shape[1]), 777.0)
            p = torch.tensor([*map(float, params), *[0.0] * (8 - len(params))])
            library.run(columns.shape[1], *(ctypes.c_void_p(t.data_ptr()) for t in (columns, p, out)))
            return out

        return call

    return compile


@pytest.mark.parametrize("name, params", VARIANTS, ids=str)
def test_translated_twin_equals_autograd_of_the_pytorch_form(name, params, compile_twin):
    loss = bind(name, **params).for_vocabulary(151936)
    stats, inputs = _grid(name)
    expected = _torch_form(loss, stats, inputs)
    twin = objective_of(loss, inputs)[0].twin
    out = compile_twin(twin.fn, twin.metrics)(torch.stack([*stats, *(getattr(inputs, field) for field in INPUTS)]), twin.params)
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=tol.TWIN, equal_nan=True)


def test_every_construct(compile_twin):
    columns = torch.randn(9, 500)
    columns[1].abs_()
    columns[8] = columns[8] > 0
    columns[2, ::3] = 0.0
    logp, H, lse, coef, adv, old, roll, ref, expert = columns
    expert = expert != 0
    x, y = 0.5 * H.clamp(0.25, 1) + 1 / 8, logp.exp()
    low = (logp < -1) | ~(H >= 1) & (lse != 0)
    off = low ^ expert
    y = torch.where(low, torch.where(off, 1.0, y), -y.sqrt().abs())
    z = x * y + (x + 2).log2() - (3 + x).log() + torch.tensor(0.7).sigmoid()
    off = off & torch.where(expert, low, True)
    expected = torch.stack([z, low * 2.0, off.float(), torch.exp2(-x), x, low.float(), torch.full_like(x, -math.inf), coef + adv + old + roll + ref])
    torch.testing.assert_close(compile_twin(everything, 3)(columns, [0.7]), expected, atol=1e-5, rtol=1e-6)


def test_constants_are_folded_in_double_and_rounded_once():
    assert "0.16666666666666666f" in translate(weighting.chord_phi, 1)


@triton.jit
def _with_if(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    if logp > -1.0:
        logp = -1.0
    return -logp, -1.0, 0.0, 0.0, 1.0


@triton.jit
def _with_loop(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    for _ in range(3):
        logp = logp * 0.5
    return -logp, -1.0, 0.0, 0.0, 1.0


@triton.jit
def _with_load(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    return -tl.load(logp), -1.0, 0.0, 0.0, 1.0


@triton.jit
def _with_keyword(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    return -tl.maximum(logp, H, propagate_nan=tl.PropagateNan.ALL), -1.0, 0.0, 0.0, 1.0


@triton.jit
def _with_power(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    return logp**2, -1.0, 0.0, 0.0, 1.0


@triton.jit
def _with_number_as_truth(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    return tl.where(logp, 1.0, 0.0), -1.0, 0.0, 0.0, 1.0


@triton.jit
def _with_unknown_name(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    return math.pi * logp, -1.0, 0.0, 0.0, nowhere  # noqa: F821


@triton.jit
def _calls_itself(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    return _calls_itself(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7)


@triton.jit
def _other_arguments(logp, H, lse):
    return -logp, -1.0, 0.0, 0.0, 1.0


@pytest.mark.parametrize("twin, what", [
    (_with_if, r"the statement 'if logp > -1.0:'"), (_with_loop, r"the statement 'for _ in range\(3\):'"), (_with_load, r"the call 'tl.load\(logp\)'"),
    (_with_keyword, "the keyword argument 'propagate_nan'"), (_with_power, r"the expression 'logp \*\* 2'"),
    (_with_number_as_truth, "'logp' is a number where a truth value is expected"), (_with_unknown_name, "the name 'nowhere'"),
    (_calls_itself, "calls itself"), (_other_arguments, r"_other_arguments takes \(logp, H, lse\), got 17 arguments"),
])  # fmt: skip
def test_what_cannot_be_translated_is_named_with_the_remedy(twin, what):
    with pytest.raises(ValueError, match=f"twin '{twin.fn.__name__}'.*{what}.*use backend 'triton'"):
        translate(twin, 0)


def test_the_error_names_the_line():
    line = _with_if.fn.__code__.co_firstlineno + 2
    with pytest.raises(ValueError, match=rf"test_twin_cuda.py:{line};"):
        translate(_with_if, 0)


def test_too_few_values_and_no_twin_at_all():
    with pytest.raises(ValueError, match="twin 'sft' returns 5 values; expected loss, a, b, c, weight and 1 metrics"):
        translate(weighting.sft, 1)
    with pytest.raises(ValueError, match="a twin is a @triton.jit function, got <built-in function exp>"):
        translate(math.exp, 0)
