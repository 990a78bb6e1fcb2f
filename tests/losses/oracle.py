"""What the losses are held to: a plain fp64 log_softmax, and every loss with its derivatives written out by hand.

T tokens, V vocabulary.  Formulae in p, branch by branch, as the papers print them: nothing of megatron_plugin.losses is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.contract import TokenInputs

FP64 = 2e-15       # two ways of writing one fp64 formula, absolute and relative; measured 4.4e-16
FP32_LOSS = 4e-7   # one fp32 formula on one token, absolute and relative; measured 9.1e-8 (eaft)
TABLE = 6e-7       # hand values carry six decimals: half a unit of the last one, and a little
VOCAB = 7          # of the random rows: small enough for finite differences, odd, no power of two

DETACHED = ("dft", "sft_is", "gce", "chord_phi", "idft", "cll_mask", "cll_sigmoid", "eaft", "srft_demo")
STEPS = ("cll_mask",)  # of these the weight has derivative 0 wherever it has one: detached or not, the gradient is the same
DIFFERENTIATED = ("sft", "luffy", "grpo")  # sft has no weight; luffy through p, grpo through the ratio, on purpose


def dense_stats(logits_TV: Tensor, labels_T: Tensor) -> TokenStats:
    logp_TV = torch.log_softmax(logits_TV, -1)
    p_TV = logp_TV.exp()
    entropy_T = -(p_TV * torch.where(p_TV > 0, logp_TV, 0.0)).sum(-1)  # 0 log 0 = 0, in the gradient too
    return TokenStats(logp_TV.gather(-1, labels_T[:, None])[:, 0], entropy_T, torch.logsumexp(logits_TV, -1))


def random_tokens(T: int = 64, V: int = VOCAB, seed: int = 0) -> tuple[Tensor, Tensor, TokenInputs]:
    """fp64 logits with gradient, labels, and inputs whose ratios fall on both sides of every clip of grpo."""
    g = torch.Generator().manual_seed(seed)
    logits_TV = (2 * torch.randn(T, V, generator=g, dtype=torch.float64)).requires_grad_()
    labels_T = torch.randint(V, (T,), generator=g)
    logp_T = dense_stats(logits_TV.detach(), labels_T).logp
    inputs = TokenInputs(
        advantage=torch.randn(T, generator=g, dtype=torch.float64),
        old_logp=logp_T + 0.7 * torch.randn(T, generator=g, dtype=torch.float64),
    )
    return logits_TV, labels_T, inputs


def dlogits(logits_TV: Tensor, labels_T: Tensor, a_T: Tensor, b_T: Tensor, c_T: Tensor | float = 0.0) -> Tensor:
    """DESIGN 1: a (e - p) - b p (log p + H) + c p, the gradient of sum F by the logits."""
    logp_TV = torch.log_softmax(logits_TV.detach(), -1)
    p_TV = logp_TV.exp()
    onehot_TV = torch.nn.functional.one_hot(labels_T, logits_TV.shape[1])
    H_T1 = -(p_TV * logp_TV).sum(-1, keepdim=True)
    c_T1 = torch.as_tensor(c_T).expand(len(labels_T))[:, None]
    return a_T[:, None] * (onehot_TV - p_TV) - b_T[:, None] * p_TV * (logp_TV + H_T1) + c_T1 * p_TV


def _weighted(w: float, logp: float) -> tuple[float, float, float]:
    return -w * logp, -w, 0.0


def _idft(logp, H, A, old, *, beta=1.0, gamma_min=0.1, gamma_max=2.0, ramp=1.0):
    raw = min(max(math.exp(-(logp + H) / beta), gamma_min), gamma_max)
    return _weighted(math.exp(logp) ** (1 + ramp * (raw - 1)), logp)


def _cll_sigmoid(logp, H, A, old, *, tau=0.0, temperature=1.0, w_min=0.1, w_max=1.0):
    return _weighted(w_min + (w_max - w_min) / (1 + math.exp((logp + H - tau) / temperature)), logp)


def _luffy(logp, H, A, old, *, gamma=0.1):
    p = math.exp(logp)
    return -A * p / (p + gamma), -A * gamma * p / (p + gamma) ** 2, 0.0


def _grpo(logp, H, A, old, *, clip_low=0.2, clip_high=0.2, dual_clip=3.0):
    r = math.exp(logp - old)
    loss = -min(r * A, min(max(r, 1 - clip_low), 1 + clip_high) * A)
    if A < 0:
        loss = min(loss, -dual_clip * A)
    selected = r <= 1 + clip_high if A >= 0 else 1 - clip_low <= r <= dual_clip
    return loss, -A * r if selected else 0.0, 0.0


Formula = Callable[..., tuple[float, float, float]]
FORMULAE: dict[str, Formula] = {
    "sft": lambda logp, H, A, old: _weighted(1.0, logp),
    "dft": lambda logp, H, A, old: _weighted(math.exp(logp), logp),
    "sft_is": lambda logp, H, A, old: _weighted(math.exp(logp) / 1.0, logp),
    "gce": lambda logp, H, A, old, gamma=0.7: _weighted(math.exp(logp) ** gamma, logp),
    "chord_phi": lambda logp, H, A, old: _weighted(math.exp(logp) * (1 - math.exp(logp)), logp),
    "idft": _idft,
    "cll_mask": lambda logp, H, A, old, threshold=-5.0: _weighted(1.0 if logp + H >= threshold else 0.0, logp),
    "cll_sigmoid": _cll_sigmoid,
    "eaft": lambda logp, H, A, old, vocab_size=VOCAB, alpha=1.0: _weighted((H / math.log(vocab_size)) ** alpha, logp),
    "srft_demo": lambda logp, H, A, old, entropy_sign=-1, max_weight=math.inf: _weighted(
        min(0.5 * math.exp(entropy_sign * H), max_weight), logp
    ),
    "luffy": _luffy,
    "grpo": _grpo,
}
"""name -> (logp, H, advantage, old_logp, **params) -> (F, dF/dlogp, dF/dH) of one token."""


def expected_terms(name: str, stats: TokenStats, inputs: TokenInputs, **params) -> tuple[Tensor, Tensor, Tensor]:
    """F, a, b of every token, [T] fp64, one token at a time."""
    columns = zip(*(x.detach().tolist() for x in (stats.logp, stats.entropy, inputs.advantage, inputs.old_logp)), strict=True)
    return torch.tensor([FORMULAE[name](*token, **params) for token in columns], dtype=torch.float64).unbind(1)
