"""A small decoder as Llama's (RMSNorm, rotary positions, SwiGLU), and sampling from it with a key-value cache, all rows at once.

B rows, T positions, D width, V vocabulary, N new tokens.  Plain PyTorch in fp32: what the study looks at are the losses, called in learn.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Drawn", "Size", "TinyLlama", "draw"]


@dataclass(frozen=True)
class Size:
    vocabulary: int
    width: int = 128
    layers: int = 3
    heads: int = 4
    inner: int = 352
    """Of SwiGLU: 8/3 of the width, as in Llama."""


class Cache:
    """Keys and values of one layer, [B, heads, longest, D / heads]."""

    def __init__(self, rows: int, size: Size, longest: int):
        shape = rows, size.heads, longest, size.width // size.heads
        self.keys, self.values, self.length = torch.empty(shape), torch.empty(shape), 0

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Layer(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        self.before_attention, self.before_inner = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width, bias=False), nn.Linear(size.width, size.width, bias=False)
        self.gate_up, self.down = nn.Linear(size.width, 2 * size.inner, bias=False), nn.Linear(size.inner, size.width, bias=False)

    def forward(self, x_BTD: Tensor, turn: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.before_attention(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = _turned(q, turn), _turned(k, turn)
        causal = T > 1  # a prompt fills an empty cache, or one token comes after it: nothing else is asked for
        if cache is not None:
            k, v = cache.add(k, v)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x_BTD = x_BTD + self.out(seen.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.before_inner(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(functional.silu(gate) * up)


class TinyLlama(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.last_norm, self.head = nn.RMSNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and "embedding" not in name:  # the way back into the residual stream starts smaller, as in GPT-2
                shrink = math.sqrt(2 * size.layers) if "out." in name or "down." in name else 1.0
                nn.init.normal_(weight, std=1 / (math.sqrt(weight.shape[1]) * shrink))

    def forward(self, ids_BT: Tensor, caches: list[Cache] | None = None, *, last: bool = False) -> Tensor:
        """Logits [B, T, V]; with `last` of the last position only, [B, V]."""
        begin = caches[0].length if caches else 0
        turn = _rotation(begin, begin + ids_BT.shape[1], self.size.width // self.size.heads)
        x_BTD = self.embedding(ids_BT)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x_BTD = layer(x_BTD, turn, cache)
        return self.head(self.last_norm(x_BTD[:, -1] if last else x_BTD))

    def caches(self, rows: int, longest: int) -> list[Cache]:
        return [Cache(rows, self.size, longest) for _ in self.layers]


def _rotation(begin: int, end: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(begin, end)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return angles.cos(), angles.sin()


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


class Drawn(NamedTuple):
    tokens: Tensor
    """[B, n] int64, n at most N: `pad` behind each answer's end token."""
    entropy: float
    """Mean over the tokens of all answers, nats: of the distributions at temperature 1, whatever they were drawn at."""


Choose = Callable[[list[Tensor], Tensor], Tensor]
"""(logits of each stream [B, V], whether each row is done [B]) -> the next token of each row [B]."""


@torch.no_grad()
def draw(model: TinyLlama, prompts: list[Tensor], longest: int, choose: Choose, *, end: int, pad: int) -> Drawn:
    """Answers of up to `longest` tokens to streams of prompts, each [B, T]: all streams get the same tokens.  One stream is plain sampling.

    `entropy` is that of the last stream."""
    rows = len(prompts[0])
    streams = [model.caches(rows, prompt.shape[1] + longest) for prompt in prompts]
    logits = [model(prompt, caches, last=True) for prompt, caches in zip(prompts, streams, strict=True)]
    done_B, tokens, entropy, count = torch.zeros(rows, dtype=torch.bool), [], 0.0, 0
    for _ in range(longest):
        next_B = torch.where(done_B, pad, choose(logits, done_B))
        logp_BV = logits[-1].log_softmax(-1)
        entropy -= float((logp_BV.exp() * logp_BV).sum(-1)[~done_B].sum())
        count += int((~done_B).sum())
        tokens.append(next_B)
        done_B = done_B | (next_B == end)
        if done_B.all():
            break
        logits = [model(next_B[:, None], caches, last=True) for caches in streams]
    return Drawn(torch.stack(tokens, 1), entropy / max(count, 1))
