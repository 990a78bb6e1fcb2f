"""The examples that need no megatron-core, as a reader starts them.  (hooks/test_example.py has the Megatron one, hooks/test_dropins_trl.py Trainer's.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def said(*words: str) -> list[float]:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(word) for word in done.stdout.split() if word.replace(".", "", 1).isdigit()]


@pytest.mark.parametrize("loss", ["sft", "dft"])
def test_a_plain_loop_learns(loss):
    first, last = said("examples/plain_pytorch.py", loss)
    assert 6 < first < 6.7 and last < 0.5


def test_the_plain_loop_is_short():
    source = (ROOT / "examples/plain_pytorch.py").read_text()
    assert len(source[source.index("def main") : source.index("if __name__")].strip().splitlines()) <= 30


@pytest.mark.torchrun
def test_the_same_losses_however_the_model_is_cut():
    """FSDP2 over rows, DTensor over the vocabulary, on one rank and on two; 1e-6: printed decimals."""
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    found = [said(*torchrun, f"--nproc-per-node={ranks}", "examples/fsdp2.py", *cut) for ranks, cut in ((1, []), (2, []), (2, ["--tensor"]))]
    assert len(found[0]) == 5 and len(set(found[0])) == 5
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1.1e-6)
