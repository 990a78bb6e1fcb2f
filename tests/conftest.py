"""One process-wide choice: compiled Triton kernels on a GPU, the interpreter without one.  Set before any kernel is decorated."""

import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.triton_interpreter import install

    install()

import pytest

warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260822)
