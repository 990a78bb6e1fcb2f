"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest
import torch

from tests.spawn import on_ranks

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_drop_in_under_megatrons_groups():
    source = next(s for s in SNIPPETS if "def loss_func" in s)
    body = source[source.index("def loss_func") :].strip().splitlines()
    assert len(body) <= 10, "the README promises a loss_func one reads at a glance"
    true_size = int(re.search(r"vocab_size=([\d_]+)", source)[1])
    logits, labels = torch.randn(1, 5, 151_936), torch.randint(0, true_size, (1, 5))
    loss_mask = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])
    logp = logits[..., :true_size].double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    expected = float((-logp * logp.exp() * loss_mask).sum())
    for loss_sum, num_tokens, report in on_ranks(
        4, "tests.parallel.ranks", "readme_loss_func", source=source, logits=logits, labels=labels, loss_mask=loss_mask
    ):
        assert loss_sum == pytest.approx(expected, rel=1e-5)
        assert num_tokens == 3 and report["nll"] == pytest.approx([float((-logp * loss_mask).sum()), 3.0], rel=1e-6)


def test_attach_in_a_forward_step():
    source = next(s for s in SNIPPETS if "attach(model" in s)
    for loss_sum, num_tokens, expected, tokens in on_ranks(2, "tests.hooks.attach_ranks", "readme", source=source.replace("151_643", "37")):
        assert loss_sum == pytest.approx(expected, rel=1e-5) and num_tokens == tokens


def test_the_loss_from_hidden_states():
    source = next(s for s in SNIPPETS if "def head_loss" in s)
    namespace = {}
    exec(source, namespace)
    hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 16), (300, 16)))
    labels, loss_mask = torch.randint(0, 300, (2, 5)), torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
    loss_sum, num_tokens = namespace["head_loss"](hidden, weight, labels, loss_mask)
    p = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[..., None])[..., 0].exp()
    expected = (-(p * (1 - p)).detach() * p.log() * loss_mask).sum()
    torch.testing.assert_close(loss_sum, expected)
    for ours, dense in zip(torch.autograd.grad(loss_sum, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    assert num_tokens == 6


def test_your_own_weighting():
    source = next(s for s in SNIPPETS if "def sharpened" in s)
    namespace = {}
    exec(source, namespace)
    assert namespace["loss"].params == {"power": 1.5} and namespace["loss"].token_local


def test_every_loss_is_in_the_table_and_every_file_named_exists():
    from megatron_plugin import LOSSES

    for name in set(LOSSES) - {"sft"}:
        assert f"`{name}`" in README, f"README's table lacks {name}"
    for path in re.findall(r"`((?:tests|examples|hooks|kernels|benchmarks)/[\w/.]+)`", README):
        root = Path(__file__).parent.parent
        assert (root / path).exists() or (root / "megatron_plugin" / path).exists(), f"README names {path}, which is not there"
