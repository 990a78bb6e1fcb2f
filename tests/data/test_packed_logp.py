"""Packed logp = unpacked logp, on a small transformer: fp64, learned positions, so that mask and position reset both matter.

b: rows, s: tokens a row, V: vocabulary.
"""

import pytest
import torch
from torch import nn

from megatron_plugin.data import IGNORE_INDEX, PackedBatch, PackedRows, attention_mask, pack_samples
from tests.data.samples import sample

V = 97
LENGTHS = (2, 7, 12, 5, 2, 11, 8, 2, 16, 2)  # one fills a row alone, several share one, some end in padding


class TinyGPT(nn.Module):
    """Two layers of torch's own transformer, pre-norm, with learned positions."""

    def __init__(self, width: int = 32, heads: int = 4, positions: int = 64):
        super().__init__()
        self.token, self.position = nn.Embedding(V, width), nn.Embedding(positions, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.heads, self.head = heads, nn.Linear(width, V)

    def forward(self, tokens_bs, position_ids_bs, mask_b1ss):
        x_bsw = self.token(tokens_bs) + self.position(position_ids_bs)
        return self.head(
            self.layers(x_bsw, mask=mask_b1ss[:, 0].repeat_interleave(self.heads, 0))
        )  # True = masked out, as in megatron-core


def logp_by_token(model: TinyGPT, batch: PackedBatch, mask_b1ss=None, position_ids=None) -> dict[int, float]:
    """token -> log-probability of its label.  All tokens differ, so this compares place by place."""
    mask_b1ss = attention_mask(batch.segment_ids) if mask_b1ss is None else mask_b1ss
    logits_bsV = model(batch.tokens % V, batch.position_ids if position_ids is None else position_ids, mask_b1ss)
    logp_bs = torch.log_softmax(logits_bsV, -1).gather(-1, (batch.labels.clamp(min=0) % V)[..., None])[..., 0]
    has_label = batch.labels != IGNORE_INDEX
    return dict(zip(batch.tokens[has_label].tolist(), logp_bs[has_label].tolist(), strict=True))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TinyGPT().double().eval()


@pytest.fixture(scope="module")
def packed() -> PackedRows:
    firsts = torch.tensor([1, *LENGTHS]).cumsum(0)[:-1].tolist()
    samples = [sample(length, first) for length, first in zip(LENGTHS, firsts, strict=True)]
    rows = pack_samples(samples, 16, pad_id=0)
    assert max(map(len, rows.rows)) >= 3 and any(sum(len(rows.samples[i].tokens_T) for i in row) < 16 for row in rows.rows)
    return rows


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys() and len(a) == sum(LENGTHS) - len(LENGTHS)
    return max(abs(a[token] - b[token]) for token in a)


@torch.no_grad()
def test_packed_equals_alone(model, packed):
    alone = {}
    for one in packed.samples:  # no padding, no mask of ours: the plain causal model on this sample only, labels sliced by hand
        s = len(one.tokens_T)
        logits_sV = model(one.tokens_T[None] % V, torch.arange(s)[None], torch.ones(1, 1, s, s, dtype=torch.bool).triu(1))[0]
        logp_sV = torch.log_softmax(logits_sV, -1)
        alone |= {int(one.tokens_T[t]): float(logp_sV[t, one.tokens_T[t + 1] % V]) for t in range(s - 1)}
    everything = range(len(packed))
    unpacked = pack_samples(packed.samples, 16, pad_id=0, packing=False)
    assert largest_difference(logp_by_token(model, packed.batch(everything)), alone) < 1e-12
    assert largest_difference(logp_by_token(model, unpacked.batch(range(len(unpacked)))), alone) < 1e-12
    assert max(alone.values()) - min(alone.values()) > 0.5, "a model that answers always the same would pass"


@torch.no_grad()
def test_the_comparison_can_fail(model, packed):
    """Without the block-diagonal mask, or without the position reset, it does not hold."""
    batch = packed.batch(range(len(packed)))
    b, s = batch.tokens.shape
    right = logp_by_token(model, batch)
    causal = torch.ones(b, 1, s, s, dtype=torch.bool).triu(1)
    assert largest_difference(right, logp_by_token(model, batch, mask_b1ss=causal)) > 1e-2
    assert largest_difference(right, logp_by_token(model, batch, position_ids=torch.arange(s).expand(b, s))) > 1e-2


def test_the_gradient_is_the_same_too(model, packed):
    unpacked = pack_samples(packed.samples, 16, pad_id=0, packing=False)
    gradients = []
    for rows in (packed, unpacked):
        batch = rows.batch(range(len(rows)))
        logits_bsV = model(batch.tokens % V, batch.position_ids, attention_mask(batch.segment_ids))
        labels = torch.where(batch.labels == IGNORE_INDEX, IGNORE_INDEX, batch.labels % V)
        loss = nn.functional.cross_entropy(logits_bsV.flatten(0, 1), labels.flatten(), reduction="sum")
        gradients.append(torch.autograd.grad(loss, [p for n, p in model.named_parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
