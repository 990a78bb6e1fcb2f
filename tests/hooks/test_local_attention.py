"""Context parallelism without Transformer Engine: loss and every gradient of a small real GPT are those of one rank."""

from functools import cache

import pytest
import torch

from tests import tolerances as tol
from tests.spawn import on_ranks

RANKS = "tests.hooks.context_ranks"
LAYOUTS = {"CP2": (1, 2, False), "CP4": (1, 4, False), "TP2xCP2": (2, 2, False), "TP2xCP2+SP": (2, 2, True)}
CASES = {
    "causal": {},
    "packed": {"packed": True},  # the mask keeps segments apart that end inside a piece, at its border and in the last one
    "learned positions": {"positions": "learned_absolute"},  # RoPE is cut by GPTModel, position_ids by the caller
}


@cache
def _one_rank(case):
    return on_ranks(1, RANKS, "one_step", tensor=1, context=1, **CASES[case])[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_are_those_of_one_rank(layout, case):
    """The last micro-batch has loss tokens in the first piece only: under CP2 rank 1, under CP4 ranks 1 to 3 have none."""
    tensor, context, sequence_parallel = LAYOUTS[layout]
    means, gradients = _one_rank(case)
    for ours, ours_gradients in on_ranks(
        tensor * context, RANKS, "one_step", tensor=tensor, context=context, sequence_parallel=sequence_parallel, **CASES[case]
    ):
        assert ours["num_tokens"] == means["num_tokens"]
        assert ours["lm loss"] == pytest.approx(means["lm loss"], rel=1e-6) and ours["entropy"] == pytest.approx(means["entropy"], rel=1e-6)
        assert ours_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert gradient.norm() > 1e-3, f"{name}: a gradient of nothing proves nothing"
            assert (ours_gradients[name] - gradient).norm() <= tol.CONTEXT_GRAD * gradient.norm(), name


def test_the_mask_matters():
    """Packed and plain rows differ by far more than layouts do, so a mask that was ignored would show."""
    packed, plain = _one_rank("packed"), _one_rank("causal")
    assert abs(packed[0]["lm loss"] / plain[0]["lm loss"] - 1) > 1e-3


def test_what_it_cannot_do_is_said():
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert "got an attention_mask of [1, 1, 4, 4], expected [b, 1, 4, 8]" in on_ranks(2, RANKS, "refusal", attention=mask)[0]
    assert "got packed_seq_params, expected None" in on_ranks(2, RANKS, "refusal", attention=None, packed_seq_params=object())[0]
