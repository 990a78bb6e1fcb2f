"""Whole steps with an attached loss under megatron-core's DDP, wrappers, distributed optimizer and schedule."""

import pytest
import torch

from tests import tolerances as tol
from tests.hooks.test_attach import _close
from tests.kernels.linear_oracle import distance
from tests.spawn import on_ranks

RANKS = "tests.hooks.attach_steps_ranks"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_multi_token_prediction_in_every_way(size, tied):
    for results in on_ranks(size, RANKS, "mtp_step", tied=tied):
        for way in ("two_pass", "one_pass", "main_grad"):
            _close(results[way], results["stock"], tol.ATTACH_GRAD)


def test_multi_token_prediction_heads_stay_plain():
    """Their own layers see the loss of their heads alone, whatever the main loss's temperature."""
    (results,) = on_ranks(1, RANKS, "mtp_step", tied=False, temperature=0.25)
    for way in ("two_pass", "one_pass"):
        theirs = {name: g for name, g in results["stock"].items() if name.startswith("mtp.")}
        _close({name: results[way][name] for name in theirs}, theirs, tol.ATTACH_GRAD)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype, scale", [("bf16", 1.0), ("fp16", 2.0**14)])
def test_half_precision_under_the_wrappers(size, dtype, scale):
    """DDP(Float16Module(GPTModel)), sequence parallel on two ranks, fp16 with the loss scale the schedule multiplies by."""
    for results in on_ranks(size, RANKS, "half", dtype=dtype, scale=scale):
        truth, true_loss = results["logits"]
        for way in ("two_pass", "one_pass", "main_grad"):
            gradients, loss = results[way]
            assert loss == pytest.approx(true_loss, rel=tol.ATTACH_HALF[dtype])
            for name, gradient in truth.items():
                assert gradient.any() and distance(gradients[name], gradient) <= tol.ATTACH_HALF[dtype], (way, name, distance(gradients[name], gradient))


@pytest.mark.parametrize("way", ["two_pass", "one_pass"])
def test_overlapped_parameter_gather(way):
    """The distributed optimizer gathers the head's parameters when the head is called: skipped, the loss would see last step's weights."""
    stock = on_ranks(2, RANKS, "parameter_gather", way="stock")
    ours = on_ranks(2, RANKS, "parameter_gather", way=way)
    for mine, theirs in zip(ours, stock, strict=True):
        for name, weight in theirs.items():
            torch.testing.assert_close(mine[name], weight, atol=tol.ATTACH_STEPS, rtol=0, msg=name)


@pytest.mark.parametrize("way", ["two_pass", "one_pass", "main_grad"])
def test_a_dropped_forward_is_found(way):
    """In main_grad the gradient of a loss nobody used is there already: megatron-core's finalize_model_grads_func is where the books are checked."""
    (((first, second), during, after),) = on_ranks(1, RANKS, "dropped_forward", way=way)
    assert ("the head ran 1 forward(s) without a backward" in first) == (way == "main_grad") and second == ""
    assert during == ("Books" if way == "main_grad" else "function") and after == "finalize_model_grads"


def test_the_books_of_main_grad_come_and_go():
    """config.finalize_model_grads_func: shared by models, wrapped by others, copied by megatron-core, missing; never recursive, never left behind."""
    (found,) = on_ranks(1, RANKS, "books")
    assert found["two models take turns"] == [""] * 4
    assert found["a copy has the stock function"] and found["one left"] and found["none left"]
    assert found["wrapped by somebody"] == ([""] * 4, 3)
    assert "finalize_model_grads_func=None" in found["nobody divides"] and found["still nobody"]
    assert found["a step given up"] == ""
