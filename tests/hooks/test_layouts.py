"""One checkpoint, one batch: the same loss and gradient in every layout, for every way of forming the loss."""

import pytest

from tests import tolerances as tol
from tests.hooks.layouts import LAYOUTS, PAGE, differences


def test_the_page_is_of_these_layouts():
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| layout")]
    assert [row[0].strip() for row in rows] == list(LAYOUTS)
    for loss, gradient in (cell.split("/") for row in rows for cell in row[1:]):
        assert float(loss) <= tol.LAYOUT_LOSS and float(gradient) <= tol.LAYOUT_GRAD


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_step_of_one_rank(name):
    """Measured differences of all layouts: megatron_plugin/hooks/LAYOUTS.md."""
    for (objective, way), (loss, gradient, parameter) in differences(name).items():
        assert loss <= tol.LAYOUT_LOSS, (objective, way, loss)
        assert gradient <= tol.LAYOUT_GRAD, (objective, way, parameter, gradient)
