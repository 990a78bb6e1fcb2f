"""One checkpoint, one batch: the same loss and gradient in every layout, for every way of forming the loss."""

import pytest

from tests import tolerances as tol
from tests.hooks.layouts import LAYOUTS, differences


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_step_of_one_rank(name):
    """Measured differences of all layouts: megatron_plugin/hooks/LAYOUTS.md."""
    for (objective, way), (loss, gradient, parameter) in differences(name).items():
        assert loss <= tol.LAYOUT_LOSS, (objective, way, loss)
        assert gradient <= tol.LAYOUT_GRAD, (objective, way, parameter, gradient)
