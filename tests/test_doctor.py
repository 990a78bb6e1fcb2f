"""`megatron-plugin doctor`: true about this environment, and clear about a broken one.  Broken accelerators: tests/hooks/test_accelerators.py."""

import re
from pathlib import Path

import pytest
import torch

from megatron_plugin import cli, doctor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def findings():
    return {finding.what: finding for finding in doctor.examine()}


def test_what_is_here(findings):
    from importlib.metadata import version

    assert not [finding for finding in findings.values() if finding.state == "BROKEN"]
    assert version("torch") in findings["torch"].text and findings["megatron-core"].text == version("megatron-core")
    assert findings["triton"].text == version("triton")
    assert findings["transformers"] == ("ok", "transformers", version("transformers"))
    assert "layers: " in findings["megatron-core uses"].text and "Adam of " in findings["megatron-core uses"].text
    if not torch.cuda.is_available():
        assert findings["GPU"] == ("note", "GPU", "none: CPU and gloo")
        assert "on CPU tensors: cpp" in findings["kernels"].text or "on CPU tensors: eager" in findings["kernels"].text
    assert {"Transformer Engine", "apex", "C++ compiler", "vllm", "megatron.bridge"} <= set(findings)


def test_the_command_exits_0(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ok +torch +2\.", out, re.M) and re.search(r"^(ok|note) +vllm ", out, re.M)


def _of(generator, what):
    return next(finding for finding in generator if finding.what == what)


def test_the_command_exits_2_and_names_what_is_broken(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    there = doctor._there
    monkeypatch.setattr(doctor, "_there", lambda module: module != "psutil" and there(module))
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr()
    assert re.search(r"^BROKEN +psutil +not installed: megatron-core's checkpoint writer hangs for ever .*: pip install psutil$", said.out, re.M)
    assert said.err == "megatron-plugin: error: broken here: psutil; the lines above say what to do\n"


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"torch": "2.5.1", "triton": "3.1"}.get)
    assert _of(doctor._torch(), "torch").state == "BROKEN" and "expected 2.6 or newer" in _of(doctor._torch(), "torch").text
    monkeypatch.setattr(doctor, "_version", {"torch": "2.10.0+cu130", "triton": "3.1"}.get)
    assert _of(doctor._torch(), "torch").state == "ok", "2.10 is newer than 2.6"


def test_other_versions_of_megatron_core(monkeypatch):
    from megatron_plugin.hooks import accelerators, mcore

    for number, state in {"0.13.1": "note", "0.14.0": "ok", "0.19.2+abc": "ok", "0.20.0": "note", "1.0": "note"}.items():
        monkeypatch.setattr(accelerators, "megatron_core_version", lambda number=number: number)
        found = _of(doctor._megatron_core(True), "megatron-core")
        assert found.state == state and found.text.startswith(number), number
        assert ("expected 0.14 to 0.19" in found.text) == (state == "note")

    def lacks():
        raise ImportError("it lacks megatron.core.distributed.finalize_model_grads(num_tokens=...)")

    monkeypatch.setattr(mcore, "check_megatron_core", lacks)
    found = _of(doctor._megatron_core(True), "megatron-core")
    assert found.state == "BROKEN" and "it lacks megatron.core.distributed" in found.text
    monkeypatch.setattr(doctor, "_there", lambda module: module != "megatron.core")
    assert _of(doctor._megatron_core(True), "megatron-core").state == "note", "the ops need no megatron-core"


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert _of(doctor._backends(), "C++ compiler") == (
        "note", "C++ compiler", "'no-such-compiler' not found: install one, or name it in CXX; without it CPU tensors go slower"
    )  # fmt: skip


def test_the_versions_are_those_of_the_project():
    first, last = (".".join(map(str, bound)) for bound in doctor.SUPPORTED)
    assert f"megatron-core>={first},<0.{doctor.SUPPORTED[1][1] + 1}" in (ROOT / "pyproject.toml").read_text()
    assert f"megatron-core {first} to {last} is supported" in (ROOT / "megatron_plugin/hooks/VERSIONS.md").read_text()


def test_data_files(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "a", "response": "b"}\n')
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    assert cli.main(["doctor", "--data", str(good)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{good}: 1 lines, 1 good, 0 bad, 0 duplicates\n") and out.endswith("control tokens in the text, lengths in tokens: not checked without --tokenizer\n")
    assert cli.main(["doctor", "--data", str(good), str(bad)]) == 4
    said = capsys.readouterr()
    assert f"\n{bad}:2: missing key 'response' (of prompt/response) (got keys ['prompt'])\n" in said.out and f"{good}: 1 lines" in said.out
    assert said.err.startswith("megatron-plugin: error: 1 of 3 lines are bad: ") and "max_bad_fraction" in said.err
    assert cli.main(["doctor", "--data", str(bad), str(tmp_path / "none")]) == 4
    assert capsys.readouterr().err.startswith("megatron-plugin: error: 1 of 2 files cannot be read, 1 of 2 lines of the others are bad")
    assert cli.main(["doctor", "--data", str(bad), "--show", "0"]) == 4
    assert "and 1 more bad lines (--show)\n" in capsys.readouterr().out


def test_data_files_with_a_tokenizer(capsys, monkeypatch, tmp_path):
    from megatron_plugin.data import train_tokenizer

    monkeypatch.delenv("RANK", raising=False)
    train_tokenizer(["a b c"], tmp_path / "tokenizer", vocab_size=300)
    data = tmp_path / "x.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "b b b b b b b b"}\n')
    arguments = ["doctor", "--data", str(data), "--tokenizer", str(tmp_path / "tokenizer")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "a line: median 6" in out and "not checked" not in out
    assert cli.main([*arguments, "--seq-length", "10"]) == 4 and f"{data}:2: too long (got 20 tokens, expected at most 10)" in capsys.readouterr().out
    assert cli.main(["doctor", "--data", str(data), "--tokenizer", str(tmp_path / "none")]) == 4
    assert "no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--data", "x", "--seq-length", "9"], "got --seq-length without --tokenizer"),
    (["--data"], "expected at least one argument"), (["--data", "x", "--show", "-1"], "expected"),
])  # fmt: skip
def test_data_arguments(capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err
