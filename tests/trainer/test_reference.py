"""The reference policy is what the weights were, and swapping it in and out leaves no trace."""

import pytest

from tests.spawn import on_ranks

RANKS = "tests.trainer.mixed_ranks"
LAYOUTS = {
    "TP1": (1, {}),
    "TP2xPP2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "DP2, distributed optimizer": (2, {"parallel.distributed_optimizer": "true"}),
    "bf16, DP2, distributed optimizer": (2, {"parallel.distributed_optimizer": "true", "train.dtype": "bf16"}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return on_ranks(1, RANKS, "save", run_dir=str(tmp_path_factory.mktemp("weights") / "run"))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swapping_in_and_out_leaves_no_bit_behind(layout, checkpoint, tmp_path):
    """Scores of both policies, and three optimizer steps with a swap between gradient and step: bit for bit those without."""
    size, overrides = LAYOUTS[layout]
    for found in on_ranks(size, RANKS, "with_reference", overrides=overrides | {"run_dir": tmp_path / "run"}, checkpoint=checkpoint):
        assert found["they differ"] > 1e-3, "the step must have moved the weights"
        assert (found["reference"], found["own"], found["own after an error"], found["steps"]) == (0, 0, 0, 0)
        nested, error, backward = found["error"]
        assert "swapped_in() inside swapped_in()" in nested and error == "division by zero" and "modified by an inplace operation" in backward
        assert found["bytes"][0] == found["bytes"][1] > 0
        assert found["seconds"][0] == 8 and found["seconds"][1] > 0, "in and out, four times"


def test_an_exchange_that_fails_half_way_is_undone(checkpoint, tmp_path):
    ((said, difference),) = on_ranks(1, RANKS, "interrupted_exchange", overrides={"run_dir": tmp_path / "run"}, checkpoint=checkpoint)
    assert "size" in said and difference == 0
