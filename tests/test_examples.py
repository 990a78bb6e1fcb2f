"""The examples that need no megatron-core, as a reader starts them.  (hooks/test_example.py has the Megatron one, hooks/test_dropins_trl.py Trainer's.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.example_ranks import free_port
from tests.spawn import on_ranks

ROOT = Path(__file__).parent.parent


def said(*words: str) -> list[float]:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return numbers(done.stdout)


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split() if word.replace(".", "", 1).isdigit()]


def test_a_plain_loop_learns():
    first, last = said("examples/plain_pytorch.py", "sft")
    assert 6 < first < 6.7 and last < 0.5
    (text,) = on_ranks(1, "tests.example_ranks", "run_example", path=str(ROOT / "examples/plain_pytorch.py"), arguments=["dft"], port=free_port())
    first, last = numbers(text)
    assert 6 < first < 6.7 and last < 0.5


def test_the_plain_loop_is_short():
    source = (ROOT / "examples/plain_pytorch.py").read_text()
    assert len(source[source.index("def main") : source.index("if __name__")].strip().splitlines()) <= 30


@pytest.mark.torchrun
def test_the_same_losses_however_the_model_is_cut():
    """FSDP2 over rows, DTensor over the vocabulary, on one rank and on two; 1e-6: printed decimals."""
    found = [said("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "examples/fsdp2.py")]  # as a reader starts it
    for ranks, cut in ((1, []), (2, ["--tensor"])):
        path = str(ROOT / "examples/fsdp2.py")
        found.append(numbers("".join(on_ranks(ranks, "tests.example_ranks", "run_example", path=path, arguments=cut, port=free_port()))))
    assert len(found[0]) == 5 and len(set(found[0])) == 5
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1.1e-6)
