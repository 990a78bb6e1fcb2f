"""What both sides are given: small batches with every awkward thing in them, the same bits in fp32 as in fp64 rounded once.

b sequences, s places of each, V vocabulary.  No two kinds differ in one thing only: a cell that agrees on all of them agrees on the mixture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

B, S, V = 6, 9, 23
NEVER_SAMPLED = -100
LENGTHS = {"plain": (9, 4, 7, 1, 9, 5), "ugly": (1, 9, 2, 9, 3, 8), "hot": (6, 9, 9, 3, 1, 7), "gap": (9, 0, 4, 6, 0, 3)}
TEMPERATURE = {"plain": 1.0, "ugly": 0.7, "hot": 1.7, "gap": 1.0}
SEED = {"plain": 11, "ugly": 12, "hot": 13, "gap": 14}
KINDS = ("plain", "ugly", "hot")
"""What a cell is tried on unless it says otherwise; in "gap" two sequences have no trained token, which not all peers count alike."""
REWARDS = {
    "mixed": [[1.0, 0.0, 0.0, 0.5], [1.0, 1.0, 0.0, 0.0], [0.25, -2.0, 3.0, 0.5]],
    "equal": [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]],
    "one": [[1.0], [0.0], [-2.5]],
    "sevens": [[0.7] * 12, [0.7, 0.1] * 6],  # the fp32 mean of twelve 0.7 is another number than 0.7
}
"""By prompt; one length in each, so that those who take a matrix can take part."""


@dataclass(frozen=True)
class Case:
    """One batch.  Floating point tensors have the dtype of the run."""

    kind: str
    logits: Tensor
    """[b, s, V], not yet divided by the temperature.  "ugly" has rows that are certain of the label (+40) and of another one (-40)."""
    labels: Tensor
    """[b, s] int64, already shifted, real ids everywhere, under the mask too."""
    mask: Tensor
    """[b, s] bool: ragged on the right; in "hot" with holes, as a tool's tokens leave them."""
    temperature: float
    advantage: Tensor
    """[b]: both signs, and exactly 0 for the two answers of a group of equal rewards."""
    old_logp: Tensor
    """[b, s] nats: ratios on both sides of every clip, a few beyond the dual clip; finite under the mask."""
    rollout_logp: Tensor
    ref_logp: Tensor
    expert: Tensor
    """[b] bool: demonstrations and own answers, both."""
    reward: Tensor | None = None
    """[b], for losses that ask whether an answer is right; None: it is where the advantage is above 0."""

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype

    def rows(self, chosen: slice) -> Case:
        """Some of the sequences: a micro-batch."""
        parts = {name: x[chosen] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **parts)

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """[b] -> [b, s]"""
        return per_sequence[:, None].expand(self.labels.shape)


def make_case(kind: str, dtype: torch.dtype) -> Case:
    g = torch.Generator().manual_seed(SEED[kind])

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    logits = normal(B, S, V, scale=2.0)
    likely = torch.multinomial((logits.view(-1, V) / TEMPERATURE[kind]).softmax(-1), 1, generator=g).view(B, S)
    labels = torch.where(torch.rand(B, S, generator=g) < 0.6, likely, torch.randint(V, (B, S), generator=g))  # p from 1e-4 to 0.9
    mask = torch.arange(S) < torch.tensor(LENGTHS[kind])[:, None]
    if kind == "hot":
        mask = mask & (torch.rand(B, S, generator=g) > 0.3) | (torch.arange(S) == 0)
    if kind == "ugly":
        for row, column, height in ((1, 0, 40.0), (1, 5, -40.0), (3, 2, 40.0), (3, 8, -40.0), (5, 1, -20.0)):
            logits[row, column, labels[row, column]] = height
    temperature = TEMPERATURE[kind]
    logp = (logits / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    old = logp + normal(B, S, scale=0.4)
    old[0, 0], old[2, 0], old[1, 2] = logp[0, 0] - 1.6, logp[2, 0] - 1.6, logp[1, 2] + 3.0  # ratios of 5 and of 0.05
    advantage = normal(B) * torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).double()
    advantage[[3, 4]] = 0.0
    advantage[0], advantage[1] = -advantage[0].abs(), advantage[1].abs()
    rollout = old + normal(B, S, scale=0.5)
    rollout[0] += 0.2  # a wrong answer on either side of the bound of off-policy masking, by whose policy is asked
    made = {"logits": logits, "advantage": advantage, "old_logp": old, "rollout_logp": rollout, "ref_logp": logp + normal(B, S, scale=0.6)}
    expert = torch.tensor([False, True, False, False, True, False])
    return Case(kind, labels=labels, mask=mask, temperature=temperature, expert=expert, **{name: x.to(dtype) for name, x in made.items()})
