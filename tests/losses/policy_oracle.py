"""What the losses with rollouts are held to: each one's value with its stopped parts frozen, and its derivative by hand, token by token.

Plain Python in p and r, branch by branch, as the papers print them; nothing of megatron_plugin.losses is used.  T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_plugin.losses.contract import TokenInputs, TokenStats
from tests.losses.oracle import VOCAB, dense_stats

NAN = math.nan
SEQUENCES = 5


def policy_tokens(T: int = 96, seed: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, TokenInputs]:
    """Logits with gradient, labels, and inputs with everything set.  Expert rows hold NaN in all that was never sampled."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(T, generator=g, dtype=torch.float64)

    logits_TV = (2 * torch.randn(T, VOCAB, generator=g, dtype=torch.float64)).to(dtype)
    labels_T = torch.randint(VOCAB, (T,), generator=g)
    logp_T = dense_stats(logits_TV.double(), labels_T).logp
    expert_T = torch.rand(T, generator=g) < 0.3
    sampled = [torch.where(expert_T, NAN, logp_T + noise) for noise in (normal(0.7), normal(0.9), normal(0.8))]
    extra = {
        "reward": torch.where(expert_T, NAN, torch.randint(2, (T,), generator=g).double()),
        "entropy": torch.rand(T, generator=g, dtype=torch.float64) * 2,
        "sequence": torch.randint(SEQUENCES, (T,), generator=g),
    }
    inputs = TokenInputs(expert=expert_T, advantage=normal(1.0), old_logp=sampled[0], rollout_logp=sampled[1], ref_logp=sampled[2], extra=extra)
    return logits_TV.requires_grad_(), labels_T, inputs.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


def all_own(inputs: TokenInputs) -> TokenInputs:
    """The same without experts: for losses of rollouts alone, every field finite."""
    filled = inputs.map(lambda x: x.nan_to_num(-1.0) if x.is_floating_point() else x)
    return TokenInputs(**{name: x for name, x in filled.tensors().items() if not name.startswith("extra.") and name != "expert"}, extra=filled.extra)


def tokens_of(stats: TokenStats, inputs: TokenInputs) -> list[SimpleNamespace]:
    """One namespace per token: l0 and H as they are now (frozen), A, old, roll, ref, expert, reward, scope (an entropy from outside), mean."""
    column = {name: x.tolist() for name, x in inputs.tensors().items()}
    size = len(stats.logp)
    default = {"old_logp": stats.logp.tolist(), "expert": [False] * size}
    get = lambda name: column.get(name, default.get(name, [NAN] * size))  # noqa: E731
    names = {"l0": stats.logp.tolist(), "H": stats.entropy.tolist(), "A": get("advantage"), "old": get("old_logp"), "roll": get("rollout_logp"),
             "ref": get("ref_logp"), "expert": get("expert"), "reward": get("extra.reward"), "scope": get("extra.entropy"), "y": get("extra.sequence")}  # fmt: skip
    tokens = [SimpleNamespace(**dict(zip(names, values, strict=True))) for values in zip(*names.values(), strict=True)]
    for t in tokens:
        same = [x.l0 - x.old for x in tokens if x.y == t.y]
        t.mean = sum(same) / len(same) if same else NAN
    return tokens


def clipped(t, l, *, clip_low=0.2, clip_high=0.2, dual_clip=3.0, log_ratio=None):
    r = math.exp(l - t.old if log_ratio is None else log_ratio + l - t.l0)
    value = -min(r * t.A, min(max(r, 1 - clip_low), 1 + clip_high) * t.A)
    if t.A < 0:
        value = min(value, -dual_clip * t.A)
    passes = r <= 1 + clip_high if t.A >= 0 else 1 - clip_low <= r <= dual_clip
    return value, -t.A * r if passes else 0.0


def gspo(t, l, *, clip_low=3e-4, clip_high=4e-4):
    return clipped(t, l, clip_low=clip_low, clip_high=clip_high, dual_clip=math.inf, log_ratio=t.mean)


def cispo(t, l, *, clip_low=1.0, clip_high=4.0):
    w = min(max(math.exp(t.l0 - t.old), 1 - clip_low), 1 + clip_high) * t.A
    return -w * l, -w


def chord(t, l, *, preset="phi", **clips):
    if not t.expert:
        return clipped(t, l, **clips)
    p = math.exp(t.l0)
    w = {"mu": 1.0, "is": p}.get(preset.removeprefix("chord_"), p * (1 - p))
    return -w * l, -w


def srft(t, l, *, preset="paper", entropy_scope="token", max_entropy=math.inf, wrong_floor=-10.0, gamma=0.1, **clips):
    H = min(t.H if entropy_scope == "token" else t.scope, max_entropy)
    up, down, p = math.exp(H), math.exp(-H), math.exp(l)
    if t.expert and preset == "paper":
        return -0.5 * down * l - t.A * p, -0.5 * down - t.A * p
    if t.expert:
        return -0.5 * up * l - t.A * p / (p + gamma), -0.5 * up - t.A * gamma * p / (p + gamma) ** 2
    if preset == "paper":
        return (-0.1 * up * l, -0.1 * up) if t.reward > 0 else (max(l, wrong_floor), 1.0 if l >= wrong_floor else 0.0)
    value, slope = clipped(t, l, **clips)
    w = 0.1 * up if t.A > 0 else 1.0
    return w * value, w * slope


FORMULAE: dict[str, Callable] = {"grpo": clipped, "gspo": gspo, "cispo": cispo, "chord": chord, "srft": srft}
"""name -> (token, l, **params) -> (value at log-probability l with the stopped parts at token.l0, derivative by l)."""
KL = {
    "k1": lambda x: (x, 1.0),
    "k2": lambda x: (x * x / 2, x),
    "k3": lambda x: (math.exp(-x) - 1 + x, 1 - math.exp(-x)),
    "k1+": lambda x: (x, x),
    "k3+": lambda x: (math.exp(-x) - 1 + x, x),
}
"""x = l - l_ref -> (value, derivative)."""


def one_token(name, t, l, *, kl=0.0, kl_estimator="k3", tis=math.inf, icepop_low=0.0, icepop_high=math.inf, **own):
    value, slope = FORMULAE[name](t, l, **own)
    if not t.expert and (tis < math.inf or icepop_low > 0 or icepop_high < math.inf):
        ratio = math.exp(t.old - t.roll)
        w = min(ratio, tis) if icepop_low <= ratio <= icepop_high else 0.0
        value, slope = w * value, w * slope
    if not t.expert and kl:
        at, slope_kl = KL[kl_estimator](l - t.ref)
        if kl_estimator.endswith("+"):  # straight-through: near l0 it moves as k2
            at = KL[kl_estimator](t.l0 - t.ref)[0] + KL["k2"](l - t.ref)[0] - KL["k2"](t.l0 - t.ref)[0]
        value, slope = value + kl * at, slope + kl * slope_kl
    return value, slope


def expected(name: str, stats: TokenStats, inputs: TokenInputs, **params) -> tuple[Tensor, Tensor]:
    """Value and dF/dlogp of every token, [T] fp64."""
    detached = TokenStats(*(x.detach().double() for x in stats))
    pairs = [one_token(name, t, t.l0, **params) for t in tokens_of(detached, inputs)]
    return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))


def frozen_sum(name: str, stats: TokenStats, inputs: TokenInputs, **params) -> Callable[[Tensor], float]:
    """Sum of the values as a function of logp [T], the stopped parts as they are in `stats`."""
    tokens = tokens_of(TokenStats(*(x.detach() for x in stats)), inputs)
    return lambda logp_T: sum(one_token(name, t, float(x), **params)[0] for t, x in zip(tokens, logp_T, strict=True))
