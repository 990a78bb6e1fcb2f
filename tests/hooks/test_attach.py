"""attach and detach on real GPTModels: nothing changes but the loss, which is right for any upstream gradient; what does not fit is refused."""

import pytest
import torch

from megatron_plugin import Head
from tests import tolerances as tol
from tests.kernels.linear_oracle import distance
from tests.spawn import on_ranks

RANKS = "tests.hooks.attach_ranks"
VOCABULARY = 37


def _close(ours: dict, theirs: dict, bound: float):
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, gradient in theirs.items():
        assert gradient.any(), name
        assert distance(ours[name], gradient) <= bound, (name, distance(ours[name], gradient))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sft_is_the_models_own_loss_and_detach_leaves_no_trace(size, tied):
    for found in on_ranks(size, RANKS, "sft_against_stock", tied=tied):
        (before, before_grads), (ours, grads), (after, after_grads) = (found["runs"][k] for k in ("before", "with", "after"))
        torch.testing.assert_close(ours, before, atol=tol.ATTACH_LOSS, rtol=tol.ATTACH_LOSS)
        _close(grads, before_grads, tol.ATTACH_GRAD)
        assert torch.equal(after, before) and all(torch.equal(after_grads[n], g) for n, g in before_grads.items()), "bit by bit"
        assert found["after"] == found["before"] and found["keys"] == found["before"][:2]
        assert torch.equal(found["logits"], found["stock logits"]), "without labels the model gives logits as before"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_multi_token_prediction_heads_keep_their_loss(tied):
    """megatron-core calls the head for its MTP layer first; its gradient enters through hidden states, beside the main loss's."""
    for found in on_ranks(1, RANKS, "sft_against_stock", tied=tied, mtp=True):
        (before, before_grads), (ours, grads), _ = (found["runs"][k] for k in ("before", "with", "after"))
        assert any("mtp" in name for name in before_grads)
        torch.testing.assert_close(ours, before, atol=tol.ATTACH_LOSS, rtol=tol.ATTACH_LOSS)
        _close(grads, before_grads, tol.ATTACH_GRAD)


CASES = {
    "dft": dict(loss="dft"),
    "chord_phi with an entropy bonus": dict(loss="chord_phi", params=dict(entropy_bonus=0.05)),
    "grpo": dict(loss="grpo", grad_inputs=True),
    "padding masked": dict(loss="dft", head=Head(vocab_size=VOCABULARY)),
    "temperature": dict(loss="idft", head=Head(vocab_size=VOCABULARY, temperature=0.7)),
    "softcap": dict(loss="dft", head=Head(softcap=5.0)),
    "bias": dict(loss="dft", bias=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_per_token_loss_under_any_upstream_gradient(case, size):
    for ours, grads, truth, true_grads, total, true_total in on_ranks(size, RANKS, "two_pass", **CASES[case]):
        torch.testing.assert_close(ours, truth, atol=tol.ATTACH_LOSS, rtol=tol.ATTACH_LOSS)
        assert ours.shape == (2, 8) and ours.dtype == torch.float32
        assert total == pytest.approx(true_total, rel=1e-5)
        _close(grads, true_grads, tol.ATTACH_GRAD)


def test_masks_and_weights():
    """A loss_mask only masks in the model's output, and weights once where the sum is formed; a coefficient is part of the loss."""
    (found,) = on_ranks(1, RANKS, "masks")
    weights, plain = found["weights"], found["plain"]
    live = weights != 0
    assert torch.equal(found["masked"], plain.where(live, 0.0)) and (~live).any()
    torch.testing.assert_close(found["coefficient"], plain * weights)
    expected = (plain * weights).sum()
    for way in ("two_pass sum", "one_pass sum", "one_pass coefficient", "no grad", "poisoned"):
        total, count, report = found[way]
        torch.testing.assert_close(total, expected, atol=0, rtol=2e-6, msg=way)
        assert count.dtype == torch.int32 and int(count) == int(live.sum()) and report["nll"][1] == live.sum()
        torch.testing.assert_close(report["lm loss"][0], expected, atol=0, rtol=2e-6)
    for way in ("two_pass both", "one_pass both"):
        torch.testing.assert_close(found[way][0], (plain * weights * weights).sum(), atol=0, rtol=2e-6, msg=way)


MESSAGES = {
    "twice": "already has a loss attached; call detach()",
    "adapter": "the output layer is a _Adapter, expected megatron-core's ColumnParallelLinear",
    "own forward": "the output layer _OwnForward has a forward of its own",
    "fp8": "the head's weight is a _Quantised of torch.float32, expected a plain",
    "deferred": "defer_embedding_wgrad_compute=True, expected False",
    "bias given": "takes the bias of the model's own output layer",
    "rows given": "plan.main_grad and plan.rows change with the step",
    "vocabulary": "got head.vocab_size=49, expected 1 to 48",
    "flag": "calculate_per_token_loss=False, expected True",
    "unknown loss": "dtf",
    "unknown parameter": "gama",
    "not a model": "got a model of Linear, expected megatron-core's GPTModel",
    "loss_func twice": "loss_func was called twice for one forward",
    "second forward": "a second forward inside one handle.inputs",
    "inputs without labels": "handle.inputs was given for a forward without labels",
    "nobody divides": "finalize_model_grads_func=None",
    "instance forward": "forward was replaced on the instance",
    "forward replaced later": "the output layer's forward was passed by",
    "two heads": "got 2 models with an output head",
    "piecewise": "called outside model.forward",
    "mask": "labels [2, 7] do not fit the model's hidden states: expected [b, s] = [2, 8]",
    "shape": "labels [2, 7] do not fit the model's hidden states: expected [b, s] = [2, 8]",
    "transposed": "labels [8, 2] do not fit the model's hidden states: expected [b, s] = [2, 8]",
    "flat advantage": "inputs.advantage is [16]",
    "transposed advantage": "inputs.advantage is [8, 2]",
    "one advantage": "inputs.advantage is [1, 1]",
    "flat advantage, one-pass": "inputs.advantage is [16]",
    "host mask": "on_host [8, 2] does not fit labels [2, 8]",
    "no inputs": "got inputs of dict, expected TokenInputs",
    "nested inputs": "handle.inputs inside handle.inputs",
    "detached": "nothing is attached: this handle was detached",
    "other output": "got an output of [2, 8], expected []",
    "no chunks": "got an empty list of model chunks",
    "head type": "got head of int, expected Head",
    "vocabulary type": "vocab_size='37'",
}


def test_what_is_refused():
    (found,) = on_ranks(1, RANKS, "refusals")
    assert found.keys() == MESSAGES.keys()
    for case, message in MESSAGES.items():
        assert message in found[case], (case, found[case])


def test_a_stage_without_the_head_is_left_alone():
    (first, first_repr, added), (last, last_repr, _) = on_ranks(2, RANKS, "stages")
    assert not first and "nothing attached" in first_repr and added == []
    assert last and "dft, two-pass" in last_repr
