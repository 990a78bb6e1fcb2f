"""The trainer's numbers do not depend on the layout, nor on being interrupted.  Real megatron-core on gloo ranks."""

import json
import shutil

import pytest
import torch

from tests import tolerances as tol
from tests.spawn import on_ranks

RANKS = "tests.trainer.ranks"
STEPS = 20
SMALL = {"train.eval_interval": 0, "train.global_batch": 4, "train.micro_batch": 1, "checkpoint.interval": 0, "loss.name": "dft", "data.bpe_vocab_size": 320, "train.lr": 1.0e-3,
         "model.num_layers": 4}  # fmt: skip
# what one rank trains on its own, in other ways
LAYOUTS = {
    "TP2": (2, {"parallel.tensor": 2}),
    "TP2+SP": (2, {"parallel.tensor": 2, "parallel.sequence": "true"}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "DP2": (2, {}),
    "micro-batches of 2": (1, {"train.micro_batch": 2}),
    "CP2": (2, {"parallel.context": 2}),
    "TP2xCP2+SP": (4, {"parallel.tensor": 2, "parallel.context": 2, "parallel.sequence": "true"}),
    "PP2xCP2": (4, {"parallel.pipeline": 2, "parallel.context": 2}),
    "PP2xVPP2": (2, {"parallel.pipeline": 2, "parallel.virtual": 2}),
    "DP2, distributed optimizer": (2, {"parallel.distributed_optimizer": "true"}),
    "DP2xCP2, distributed optimizer": (4, {"parallel.context": 2, "parallel.distributed_optimizer": "true"}),
    "TP2xPP2+SP": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": "true"}),
}


def _train(size: int, run_dir, **overrides) -> list[dict]:
    return on_ranks(size, RANKS, "train", overrides=SMALL | {"run_dir": run_dir} | overrides)[0]


@pytest.fixture(scope="module")
def warm(tmp_path_factory, problems):
    """A checkpoint of a few SFT steps, written by TP2: far enough from random weights for DFT to have a gradient."""
    run_dir = tmp_path_factory.mktemp("warm") / "run"
    _train(2, run_dir, **problems, **{"train.steps": 8, "loss.name": "sft", "parallel.tensor": 2})
    return run_dir


@pytest.fixture(scope="module")
def one_rank(warm, tmp_path_factory, problems):
    return _train(1, tmp_path_factory.mktemp("one") / "run", **problems, **{"train.steps": STEPS, "checkpoint.init": warm})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_norm_are_those_of_one_rank(layout, warm, one_rank, problems, tmp_path):
    size, overrides = LAYOUTS[layout]
    lines = _train(size, tmp_path / "run", **{"train.steps": STEPS, "checkpoint.init": warm}, **problems, **overrides)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for ours, reference in zip(lines, one_rank, strict=True):
        for name in ("train/loss", "train/nll", "train/entropy", "train/grad_norm"):
            assert ours[name] == pytest.approx(reference[name], abs=tol.LAYOUTS, rel=0), (ours["step"], name)
        assert ours["train/num_tokens"] == reference["train/num_tokens"]
    assert lines[-1]["eval/heldout_nll"] == pytest.approx(one_rank[-1]["eval/heldout_nll"], abs=1e-5)
    assert lines[-1]["eval/heldout_accuracy"] == one_rank[-1]["eval/heldout_accuracy"]


@pytest.mark.parametrize("layout", ["TP2xCP2+SP", "PP2xVPP2", "PP2xCP2"])
def test_greedy_answers_are_those_of_one_rank(layout, warm, problems, tmp_path):
    """Three prompts: the interleaved schedule takes two at a time.  The accuracies above are too low to show a wrong token."""
    size, overrides = LAYOUTS[layout]
    common = SMALL | problems | {"checkpoint.init": warm}
    one = on_ranks(1, RANKS, "greedy_answers", overrides=common | {"run_dir": tmp_path / "one"}, limit=12)[0]
    assert len(one) == 3 and all(len(text) > 3 for text in one)
    for ours in on_ranks(size, RANKS, "greedy_answers", overrides=common | overrides | {"run_dir": tmp_path / "run"}, limit=12):
        assert ours == one


@pytest.mark.parametrize("size, overrides", [(1, {"model.hidden_dropout": 0.1}), (2, {"parallel.tensor": 2})], ids=["TP1, dropout", "TP2"])
def test_a_resumed_run_repeats_the_undisturbed_one(size, overrides, warm, problems, tmp_path):
    common = {"train.steps": 8, "checkpoint.init": warm, "checkpoint.interval": 4, "checkpoint.resume": "auto", "checkpoint.keep": 0} | problems | overrides
    whole = _train(size, tmp_path / "whole", **common)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / "step_00000008")  # killed after step 8 was logged, before it was saved
    resumed = _train(size, cut, **common)
    assert [line["step"] for line in resumed] == list(range(1, 9))
    timeless = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in whole]
    assert [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in resumed] == timeless


@pytest.mark.parametrize("size, overrides", [(1, {}), (2, {"parallel.tensor": 2})], ids=["TP1", "TP2"])
def test_sft_is_megatron_cores_own_cross_entropy(size, overrides, problems, tmp_path):
    """One step's gradient of every parameter; a vocabulary without padding, because megatron-core counts padded columns."""
    overrides = SMALL | {"loss.name": "sft", "data.bpe_vocab_size": 320, "model.make_vocab_size_divisible_by": 64, "train.global_batch": 8} | problems | overrides
    ours = on_ranks(size, RANKS, "one_gradient", overrides=overrides | {"run_dir": tmp_path / "a"}, loss="sft")
    theirs = on_ranks(size, RANKS, "one_gradient", overrides=overrides | {"run_dir": tmp_path / "b"}, loss="megatron")
    for (our_loss, our_gradients), (their_loss, their_gradients) in zip(ours, theirs, strict=True):
        assert our_loss == pytest.approx(their_loss, rel=1e-6)
        assert our_gradients.keys() == their_gradients.keys()
        for name, gradient in our_gradients.items():
            torch.testing.assert_close(gradient, their_gradients[name], atol=1e-6, rtol=1e-4, msg=name)
        assert sum(float(g.square().sum()) for g in our_gradients.values()) > 1e-4


def test_everything_the_run_promises_is_there(warm):
    for name in ("config.yaml", "metrics.jsonl", "curves.png", "tensorboard", "tokenizer/tokenizer.json", "checkpoints/step_00000008/train_state.json"):
        assert (warm / name).exists(), name
    assert json.loads((warm / "checkpoints/step_00000008/train_state.json").read_text())["step"] == 8
