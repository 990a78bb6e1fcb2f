"""A checkpoint of any layout is loaded by any other, optimizer state included: the steps after it are those of the undisturbed run."""

import shutil

import pytest

from tests import tolerances as tol
from tests.spawn import on_ranks

RANKS = "tests.trainer.ranks"
SAVED, STEPS = 3, 6
BASE = {
    "train.eval_interval": 0, "train.global_batch": 4, "train.micro_batch": 1, "train.steps": STEPS, "train.lr": 1.0e-3, "loss.name": "sft",
    "checkpoint.interval": SAVED, "checkpoint.keep": 0, "checkpoint.resume": "auto", "data.bpe_vocab_size": 320, "data.eval_answers": 0,
    "model.num_layers": 4, "model.gated_linear_unit": "true", "train.weight_decay": 0.1,
}  # fmt: skip
DISTRIBUTED, HALF = {"parallel.distributed_optimizer": "true"}, {"train.dtype": "bf16"}
LAYOUTS = {
    "TP1": (1, {}),
    "DP2": (2, {}),
    "CP2": (2, {"parallel.context": 2}),
    "TP2": (2, {"parallel.tensor": 2}),
    "PP2xVPP2": (2, {"parallel.pipeline": 2, "parallel.virtual": 2}),
    "TP2xPP2+SP": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": "true"}),
    "TP1, distributed": (1, DISTRIBUTED),
    "DP2, distributed": (2, DISTRIBUTED),
    "DP4, distributed": (4, DISTRIBUTED),
    "DP2xCP2, distributed": (4, {"parallel.context": 2} | DISTRIBUTED),
    "TP2xDP2, distributed": (4, {"parallel.tensor": 2} | DISTRIBUTED),
    "PP2xDP2, distributed": (4, {"parallel.pipeline": 2} | DISTRIBUTED),
    "DP2 bf16": (2, HALF),
    "DP2 bf16, distributed": (2, HALF | DISTRIBUTED),
}
CHANGES = [  # saved by, loaded by
    ("TP2xPP2+SP", "TP1"),
    ("TP2xPP2+SP", "PP2xVPP2"),
    ("TP2xPP2+SP", "CP2"),
    ("PP2xVPP2", "TP2"),
    ("DP2, distributed", "DP2, distributed"),
    ("DP2, distributed", "TP1, distributed"),
    ("DP2, distributed", "DP4, distributed"),
    ("DP2, distributed", "TP2xDP2, distributed"),
    ("DP2, distributed", "PP2xDP2, distributed"),
    ("DP2xCP2, distributed", "DP2, distributed"),
    ("DP2xCP2, distributed", "TP2xPP2+SP"),  # megatron-core itself has no way between the two kinds of optimizer
    ("TP2xPP2+SP", "DP2xCP2, distributed"),
    ("DP2 bf16", "DP2 bf16, distributed"),
    ("DP2 bf16, distributed", "DP2 bf16"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, problems):
    """Layout -> (its run directory, cut back to step SAVED; the lines of all its steps)."""
    runs = {}

    def run(layout):
        if layout not in runs:
            size, overrides = LAYOUTS[layout]
            run_dir = tmp_path_factory.mktemp("saved") / "run"
            lines = on_ranks(size, RANKS, "train", overrides=BASE | problems | overrides | {"run_dir": run_dir})[0]
            shutil.rmtree(run_dir / "checkpoints" / f"step_{STEPS:08d}")
            runs[layout] = run_dir, lines
        return runs[layout]

    return run


@pytest.mark.parametrize("before, after", CHANGES, ids=[f"{a} to {b}" for a, b in CHANGES])
def test_the_next_steps_are_those_of_the_undisturbed_run(before, after, saved, problems, tmp_path):
    run_dir, undisturbed = saved(before)
    shutil.copytree(run_dir, tmp_path / "run")
    size, overrides = LAYOUTS[after]
    lines = on_ranks(size, RANKS, "train", overrides=BASE | problems | overrides | {"run_dir": tmp_path / "run"})[0]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for ours, theirs in zip(lines[SAVED:], undisturbed[SAVED:], strict=True):
        for name in ("train/loss", "train/grad_norm", "train/lr"):
            assert ours[name] == pytest.approx(theirs[name], abs=tol.LAYOUTS, rel=0), (ours["step"], name)


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_a_checkpoint_without_optimizer_state_is_named(distributed, tmp_path):
    overrides = {"run_dir": tmp_path / "run", "parallel.distributed_optimizer": distributed}
    message = on_ranks(2, RANKS, "save_and_load", overrides=overrides, optimizer=False)[1]
    assert "step_00000000: its optimizer state does not fit this run: got a checkpoint of weights alone" in message
    assert "take its weights with checkpoint.init" in message


def test_a_format_that_fixes_the_layout_is_named(tmp_path):
    overrides = {"run_dir": tmp_path / "run"} | DISTRIBUTED
    message = on_ranks(2, RANKS, "save_and_load", overrides=overrides, optimizer=True, sharding="dp_reshardable")[0]
    assert "got optimizer state in megatron-core's format 'dp_reshardable', expected 'fully_reshardable'" in message


@pytest.mark.parametrize("other", [{"model.share_embeddings_and_output_weights": "true"}, {"model.add_bias_linear": "false"}, {"model.add_bias_linear": "true"}])
def test_a_checkpoint_of_another_model_is_refused(other, tmp_path):
    """What one has beyond the other would be dropped, or stay random."""
    overrides = {"run_dir": tmp_path / "run", "model.share_embeddings_and_output_weights": "false"}
    overrides |= {"model.add_bias_linear": {"true": "false", "false": "true"}.get(other.get("model.add_bias_linear"), "false")}
    message = on_ranks(1, RANKS, "save_and_load", overrides=overrides, optimizer=True, other=other)[0]
    assert "does not fit this model" in message and ("output_layer.weight" in message or "bias" in message)


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_an_optimizer_that_has_not_stepped_is_saved_and_loaded(distributed, tmp_path):
    overrides = {"run_dir": tmp_path / "run", "parallel.distributed_optimizer": distributed}
    assert on_ranks(2, RANKS, "save_and_load", overrides=overrides, optimizer=True) == [None, None]
