"""examples/megatron_core_dft.py under real torchrun, and what it says to bad input."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.example_ranks import free_port
from tests.spawn import on_ranks

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "megatron_core_dft.py"
TINY = ["--layers=2", "--hidden=32", "--seq-length=16", "--micro-batch=4", "--global-batch=8", "--eval-batches=1", "--lr=1e-3"]


def _torchrun(ranks, *arguments, timeout=120):
    """Output, errors and exit code; every rank is gone afterwards, whatever happened."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(EXAMPLE), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    return done.stdout, done.stderr, done.returncode


def _ranks(ranks, *arguments):
    """What they print, of ranks that are started once for all tests."""
    return "".join(on_ranks(ranks, "tests.example_ranks", "run_example", path=str(EXAMPLE), arguments=list(arguments), port=free_port()))


def _losses(output):
    """The loss of every step, in order."""
    return [float(x) for x in re.findall(r"^\S+ \d+/\d+ .*lm loss (\S+)", output, re.M)]


@pytest.mark.torchrun
@pytest.mark.timeout(400)
def test_tp1_tp2_and_dp2_give_the_same_losses():
    """Megatron initialises on the CPU from one seed, whatever the split.  Measured over 20 steps: equal in all five printed decimals."""
    runs = {}
    for name, ranks, tp in [("TP1", 1, 1), ("TP2", 2, 2), ("DP2", 2, 1)]:
        words = [f"--tp={tp}", "--warm-steps=10", "--steps=10", *TINY]
        if name == "TP2":  # once as a reader starts it
            output, errors, code = _torchrun(ranks, *words)
            assert code == 0, errors
        else:
            output = _ranks(ranks, *words)
        runs[name] = _losses(output)
        assert (
            len(runs[name]) == 20
            and output.splitlines()[-1] == f"done: 10 steps of sft, then 10 of dft, at TP{tp} PP1 DP{ranks // tp} on cpu"
        )
        nll = [float(x) for x in re.findall(r"^held out, .* nll (\S+)", output, re.M)]
        assert nll[1] < nll[0] - 0.5, "ten steps of SFT teach the alphabet"
    for name in ("TP2", "DP2"):
        assert runs[name] == pytest.approx(runs["TP1"], abs=5e-5), name


@pytest.mark.timeout(200)
def test_tensor_and_pipeline_on_a_file_with_a_loss_of_ones_own(tmp_path):
    lines = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(40)] + [{"question": "too long " * 9, "answer": "x"}]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [f"--data={tmp_path / 'train.jsonl'}", f"--eval-data={tmp_path / 'test.jsonl'}"]
    loss = ["--loss=tests.losses.user_losses.tempered", '--loss-params={"tau": 2.0}']
    output = _ranks(4, "--tp=2", "--pp=2", "--warm-steps=1", "--steps=2", "--eval-every=1", *loss, *files, *TINY)
    assert "train: 40 examples; 1 more are longer than --seq-length 16 and left out" in output
    assert len(_losses(output)) == 3 and all(map(math.isfinite, _losses(output)))
    assert output.count("held out, after") == 3 and "at TP2 PP2 DP1" in output.splitlines()[-1]


@pytest.mark.torchrun
@pytest.mark.timeout(200)
def test_impossible_sizes_end_every_rank():
    _, errors, code = _torchrun(2, "--tp=4")
    assert code != 0 and "error: got tensor x pipeline = 4 for 2 ranks, expected a divisor of 2" in errors, (
        "from whichever rank stops first"
    )
    assert re.search(r"exitcode\s*: 2\b", errors), "torchrun reports the rank's own code; its own is always 1"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("megatron_core_dft", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _stops(example, monkeypatch, capsys, *arguments):
    """(exit code, message) of main() in this process: it must stop before any process group is made."""
    monkeypatch.setattr(sys, "argv", ["megatron_core_dft.py", *TINY, *arguments])
    monkeypatch.setattr(example.torch.distributed, "init_process_group", lambda *a, **k: pytest.fail("went on"))
    with pytest.raises(SystemExit) as stopped:
        example.main()
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tp=3"], "got tensor x pipeline = 3 for 1 ranks, expected a divisor of 1"),
        (["--micro-batch=3"], "got micro batch x data-parallel ranks = 3 for 8 sequences of the global batch"),
        (["--pp=0"], "got pipeline=0, expected 1 or more"),
        (["--eval-every=0"], "got eval_every=0, expected 1 or more"),
        (["--loss=dtf"], "unknown loss 'dtf' (did you mean 'dft'?)"),
        (["--loss=gce", '--loss-params={"gama": 1}'], "loss 'gce' has no parameter 'gama' (did you mean 'gamma'?)"),
        (["--loss-params={gamma: 1}"], "Expecting property name"),
        (["--steps=many"], "argument --steps: invalid int value: 'many'"),
    ],
)
def test_configuration_errors_exit_2(example, monkeypatch, capsys, arguments, message):
    code, error = _stops(example, monkeypatch, capsys, *arguments)
    assert code == 2 and message in error


GOOD = b'{"question": "1+1?", "answer": "2"}\n'


@pytest.mark.parametrize(
    "text, where, message",
    [
        (GOOD + b'{"question": "cut', ":2: got", "JSONDecodeError"),
        (b'{"question": "no answer"}\n', ":1: got", "KeyError: 'answer'"),
        (GOOD * 2 + b'{"question": 1, "answer": 2}\n', ":3: got", "'int' object has no attribute 'encode'"),
        (GOOD + b'"a string"\n', ":2: got", "TypeError"),
        (GOOD + b"\xff\xfe\n", ":2: got", "UnicodeDecodeError"),
        (GOOD + b"\n" + GOOD, ":2: got b'\\n'", "JSONDecodeError"),
        (b"", "train: got 0 examples that fit", "expected 8 or more"),
        (GOOD * 7, "train: got 7 examples that fit", "expected 8 or more"),
        (b'{"question": "longer than sixteen bytes", "answer": "2"}\n' * 9, "train: got 0 examples that fit", "raise --seq-length"),
    ],
)
def test_data_errors_exit_4(example, monkeypatch, capsys, tmp_path, text, where, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(text)
    code, error = _stops(example, monkeypatch, capsys, f"--data={path}", f"--eval-data={path}")
    assert code == 4 and where in error and message in error and error.startswith("error: ")


def test_a_missing_file_exits_4(example, monkeypatch, capsys, tmp_path):
    code, error = _stops(example, monkeypatch, capsys, f"--data={tmp_path / 'absent.jsonl'}")
    assert code == 4 and "absent.jsonl" in error and "No such file" in error


def test_too_few_held_out_examples_exit_4(example, monkeypatch, capsys, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD * 20)
    code, error = _stops(example, monkeypatch, capsys, f"--data={path}", "--eval-batches=2")
    assert code == 4 and "got 4 examples that fit, expected 8 or more" in error


def test_the_question_is_masked_and_the_answer_learnt(example, capsys):
    args = type("Args", (), {"seq_length": 16})
    tokens, labels, mask = example.encode([(b"1+1?", b"2"), (b"?", b"abc")], args, "train", 1)
    assert tokens.shape == labels.shape == mask.shape == (2, 16)
    for row, answer in enumerate([b"2", b"abc"]):
        assert labels[row][mask[row].bool()].tolist() == [*answer, example.END], "the answer and its end-of-text, no more"
    assert bytes(tokens[0, :6].tolist()) == b"1+1?\n2" and (labels[:, :-1] == tokens[:, 1:]).all()


def test_it_stays_readable_in_one_sitting():
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) <= 150 and all(f"# ({i})" in source for i in (1, 2, 3, 4))
