"""The quick cases of every promise; `make test-faults` tries all of them."""

import pytest

from tests.faults.promises import modules

CASES = [pytest.param(case, id=f"{module.__name__.rsplit('.', 1)[1]}-{case.name}") for module in modules() for case in module.cases(full=False)]


@pytest.mark.parametrize("case", CASES)
def test_promise(case, tmp_path):
    case.run(tmp_path)
