"""Every twin against autograd of its PyTorch form, on a grid with ties, clips, certain and impossible labels and NaN."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl

from megatron_plugin import LOSSES, TokenInputs, bind
from megatron_plugin.kernels.objective import INPUTS
from megatron_plugin.losses.contract import TokenStats
from megatron_plugin.losses.objective import objective_of
from tests import tolerances as tol


@triton.jit
def call_twin(LOGP, H, LSE, COEF, ADV, OLD, ROLL, REF, EXPERT, OUT, p0, p1, p2, p3, p4, p5, p6, p7, N, TWIN: tl.constexpr, COUNT: tl.constexpr):
    """One token per program, as in the loss kernel: OUT[:, token] = (loss, a, b, c, weight, metrics)."""
    i = tl.program_id(0)
    terms = TWIN(tl.load(LOGP + i), tl.load(H + i), tl.load(LSE + i), tl.load(COEF + i), tl.load(ADV + i), tl.load(OLD + i), tl.load(ROLL + i),
                 tl.load(REF + i), tl.load(EXPERT + i) != 0, p0, p1, p2, p3, p4, p5, p6, p7)  # fmt: skip
    for k in tl.static_range(COUNT):
        tl.store(OUT + k * N + i, terms[k])


# 0: certain; -1e-7: 1 - p is one rounding; -0.5: the two forms of 1 - e^x meet; -90: p underflows fp32's normals; -inf: impossible label
LOGP = (0.0, -1e-7, -1e-3, -0.4999, -0.5, -0.6, -1.0, -2.5, -9.0, -20.0, -90.0, -math.inf, math.nan)
ENTROPY = (0.0, 1e-6, 0.7, 2.5, 11.9)
# grpo: either side of its clips (0.8, 1.2, 3); exactly 1, a tie under clips of 0; on and beyond the 20 nats
RATIOS = tuple(math.log(r) for r in (0.7999, 0.8001, 1.1999, 1.2001, 2.999, 3.001)) + (0.0, 20.0, -20.0, 25.0, -25.0)
ADVANTAGES = (-1.5, 0.0, 2.0)


def _grid(loss: str) -> tuple[TokenStats, TokenInputs]:
    if loss == "grpo":
        cases = [(lp, 1.0, lp - r, a) for lp in (-0.125, -3.0, math.nan) for r, a in itertools.product(RATIOS, ADVANTAGES)]
    else:
        cases = list(itertools.product(LOGP, ENTROPY, (-1.0,), ADVANTAGES))
    logp, entropy, old, advantage = (torch.tensor(column) for column in zip(*cases, strict=True))
    stats = TokenStats(logp, entropy, torch.linspace(-3, 30, len(logp)))
    n = len(logp)
    return stats, TokenInputs(coefficient=torch.ones(n), advantage=advantage, old_logp=old, rollout_logp=old, ref_logp=old, expert=torch.arange(n) % 2 > 0)


def _torch_form(loss, stats: TokenStats, inputs: TokenInputs) -> torch.Tensor:
    leaves = TokenStats(*(x.clone().requires_grad_() for x in stats))
    terms = loss(leaves, inputs)
    slopes = torch.autograd.grad(terms.loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    weight = torch.ones_like(terms.loss) if terms.weight is None else terms.weight
    return torch.stack([x.detach() for x in (terms.loss, *slopes, weight, *terms.metrics.values())])


VARIANTS = [
    *((name, {}) for name in sorted(name for name, loss in LOSSES.items() if loss.twin)),
    ("gce", {"gamma": 0.0}), ("gce", {"gamma": 2.5}), ("idft", {"beta": 0.5, "gamma_min": 0.3, "gamma_max": 1.0, "ramp": 0.4}),
    ("idft", {"ramp": 0.0}), ("cll_mask", {"threshold": -1.0}), ("cll_sigmoid", {"tau": -1.0, "temperature": 0.5, "w_min": 0.2, "w_max": 0.9}),
    ("cll_sigmoid", {"w_min": 1.0, "w_max": 0.0}), ("eaft", {"alpha": 0.0}), ("eaft", {"alpha": 0.5}), ("srft_demo", {"entropy_sign": 1.0, "max_weight": 3.0}),
    ("luffy", {"gamma": 0.5}), ("grpo", {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.5}), ("grpo", {"dual_clip": math.inf}), ("grpo", {"clip_low": 0.0, "clip_high": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize("name, params", VARIANTS, ids=str)
def test_twin_equals_autograd_of_the_pytorch_form(name, params, device):
    loss = bind(name, **params).for_vocabulary(151936)
    stats, inputs = _grid(name)
    expected = _torch_form(loss, stats, inputs)
    twin = objective_of(loss, inputs)[0].twin
    assert 5 + twin.metrics == len(expected)
    columns = [x.to(device) for x in (*stats, *(getattr(inputs, field) for field in INPUTS))]
    out = torch.full((len(expected), len(stats.logp)), 777.0, device=device)
    numbers = [float(p) for p in twin.params] + [0.0] * (8 - len(twin.params))
    call_twin[(len(stats.logp),)](*columns[:-1], columns[-1].view(torch.uint8), out, *numbers, out.shape[1], TWIN=twin.fn, COUNT=len(expected))
    out = out.cpu()
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=tol.TWIN, equal_nan=True)
