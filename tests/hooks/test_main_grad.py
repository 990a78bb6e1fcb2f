"""dW of the head in main_grad, under megatron-core's real DDP, buckets and schedules: the gradient of the logits path, for every parameter."""

import pytest

from tests import tolerances as tol
from tests.kernels.linear_oracle import distance
from tests.spawn import on_ranks

RANKS = "tests.hooks.main_grad_ranks"
LAYOUTS = {
    "one rank": (1, dict()),
    "dp2": (2, dict()),
    "tp2": (2, dict(tensor=2)),
    "tp2 sp": (2, dict(tensor=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline=2)),  # 1F1B: forwards of the head run ahead of backwards of the stage before
    "tp2 sp pp2": (4, dict(tensor=2, pipeline=2, sequence_parallel=True)),
}
WAYS = ("one_pass main_grad", "two_pass main_grad", "one_pass")


def _gradients(layout, ways, **options):
    ranks, where = LAYOUTS[layout]
    results = on_ranks(ranks, RANKS, "gradients", ways=ways, **where, **options)
    for result in results:
        assert not isinstance(result, str), result
    return results


def _check(result, truth):
    true_grads, true_loss, _ = truth
    for way in WAYS:
        grads, loss, clean = result[way]
        assert clean and loss == pytest.approx(true_loss, rel=1e-6) and grads.keys() == true_grads.keys()
        for name, gradient in true_grads.items():
            assert gradient.any() and distance(grads[name], gradient) <= tol.LINEAR_MEGATRON, (way, name, distance(grads[name], gradient))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_parameter_gets_the_gradient_of_the_logits_path(layout, tied):
    """overlap_grad_reduce: a hook that does not fire would leave a bucket unreduced and the step hanging."""
    for result in _gradients(layout, ("logits", *WAYS), tied=tied, overlap=True):
        _check(result, result["logits"])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_reduction_at_the_end(tied):
    for result in _gradients("dp2", ("logits", *WAYS), tied=tied, overlap=False):
        _check(result, result["logits"])


def test_a_loss_scale_and_several_steps():
    """The schedule's grad_scale_func is the upstream gradient: announced, it is in main_grad once; the books close after each step."""
    (truth,), (result,) = _gradients("one rank", ("logits",)), _gradients("one rank", WAYS, scale=1024.0, steps=2)
    for way in WAYS:
        for name, gradient in truth["logits"][0].items():
            assert distance(result[way][0][name], gradient) <= tol.LINEAR_MEGATRON, (way, name)


def test_a_loss_scale_that_was_not_announced():
    (message,) = on_ranks(1, RANKS, "gradients", ways=("one_pass main_grad",), scale=1024.0, announced=1.0)
    assert "4 backward(s) of the head brought the upstream gradient 1024, expected plan.grad_scale = 1" in message
