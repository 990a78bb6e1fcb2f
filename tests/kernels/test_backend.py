"""A backend that was asked for by name and cannot do it says so; it is never replaced by another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_plugin import linear_token_loss, token_loss, token_stats
from megatron_plugin.kernels.backend import use_backend

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("op", ["token_stats", "token_loss", "linear_token_loss"])
@pytest.mark.parametrize("backend, words", [
    ("triton", r"backend 'triton' got torch.float64 logits.*use_backend\('auto'\) or 'eager'"),
    ("cpp", "backend 'cpp' got torch.float64 logits.*use backend 'auto'"),
])
def test_fp64_is_not_computed_in_fp32(op, backend, words):
    logits, labels = torch.randn(3, 40, dtype=torch.float64), torch.tensor([1, 2, 3])
    call = {
        "token_stats": lambda: token_stats(logits, labels),
        "token_loss": lambda: token_loss(logits, labels, "dft"),
        "linear_token_loss": lambda: linear_token_loss(logits, torch.randn(9, 40, dtype=torch.float64), labels, "dft"),
    }[op]
    with use_backend(backend), pytest.raises(ValueError, match=words):
        call()
    with use_backend("eager"):
        call()


def test_triton_on_the_cpu_without_its_interpreter():
    """In a process of its own: whether kernels are interpreted is decided when they are imported."""
    program = (
        "import torch; from megatron_plugin import token_loss, token_stats; from megatron_plugin.kernels.backend import use_backend\n"
        "for op in (lambda z, y: token_stats(z, y), lambda z, y: token_loss(z, y, 'dft')):\n"
        "    for backend in ('triton', 'auto'):\n"
        "        try:\n"
        "            with use_backend(backend): op(torch.randn(2, 5), torch.tensor([1, 2])); print('done')\n"
        "        except ValueError as error: print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=True).stdout
    lines = out.splitlines()
    assert len(lines) == 4 and lines[1] == lines[3] == "done"
    for line in (lines[0], lines[2]):
        assert line.startswith("backend 'triton' got logits on the CPU") and "TRITON_INTERPRET=1" in line and "use_backend('auto')" in line
