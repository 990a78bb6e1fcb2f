"""Building the C++ row kernels: the cache, several processes at once, and every way in which it can go wrong."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_plugin.kernels import backend, build, cpu, shard_ops

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder and a process that has loaded nothing yet; as before afterwards."""
    monkeypatch.setenv("MEGATRON_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))  # nor may it find one among the temporary files
    monkeypatch.setattr(cpu, "FLAGS", ("-O0", *cpu.FLAGS[1:]))  # 1.2 s instead of 2.5 s
    _forget()
    yield tmp_path / "cache"
    _forget()


def _forget():
    """As a process that has not loaded the library yet."""
    for memo in (cpu.native, cpu._load, cpu.available):
        memo.cache_clear()


def _stats():
    return shard_ops.stats(torch.linspace(-3, 3, 1200).view(4, 300), torch.arange(4), 0, 300, -100, 1.0)


def test_without_a_compiler_one_warning_and_the_pytorch_path(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="slower PyTorch path.*'no-such-compiler' did not run.*install a C.. compiler or name one in CXX") as caught:
        got = [_stats(), _stats()]
    assert len([w for w in caught if "PyTorch path" in str(w.message)]) == 1
    with backend.use_backend("eager"):
        assert torch.equal(got[0], _stats()) and torch.equal(got[1], got[0])
    with backend.use_backend("cpp"), pytest.raises(RuntimeError, match="backend 'cpp' was asked for, but: 'no-such-compiler'"):
        _stats()


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch, tmp_path):
    script = tmp_path / "broken-c++"
    script.write_text("#!/bin/sh\ncase \"$*\" in *--version) echo 1;; *) echo 'fatal: no headers here' >&2; exit 4;; esac\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.warns(RuntimeWarning, match=r"failed with exit code 4: fatal: no headers here"):
        assert not cpu.available()
    assert not list(fresh.iterdir())  # no half object stays


def test_an_object_is_found_again_and_a_broken_one_is_built_again(fresh):
    expected = _stats()
    (path,) = fresh.iterdir()
    good, stamp = path.read_bytes(), path.stat().st_mtime_ns
    _forget()
    assert torch.equal(_stats(), expected) and path.stat().st_mtime_ns == stamp
    one_bit = good[:5000] + bytes([good[5000] ^ 1]) + good[5001:]
    for bad in (good[:9000], one_bit, b""):  # mapping the first would be a SIGBUS
        path.unlink()  # the old library is mapped: never write into it
        path.write_bytes(bad)
        _forget()
        assert torch.equal(_stats(), expected)
        rebuilt = path.read_bytes()
        assert hashlib.sha256(rebuilt[:-32]).digest() == rebuilt[-32:] and list(fresh.iterdir()) == [path]


def test_a_cache_serves_a_machine_without_a_compiler(fresh, monkeypatch):
    """An image brings the cache along: the compiler cannot be asked for its version, sources, flags and machine are the same."""
    expected = _stats()
    (path,) = fresh.iterdir()
    monkeypatch.setenv("CXX", "no-such-compiler")
    _forget()
    assert cpu.available() and torch.equal(_stats(), expected) and list(fresh.iterdir()) == [path]
    damaged = path.with_name(path.name.split("-")[0] + "-0.so")  # first in the order of names
    damaged.write_bytes(path.read_bytes()[:9000])
    _forget()
    assert cpu.available()
    path.unlink()
    _forget()
    with pytest.warns(RuntimeWarning, match="'no-such-compiler' did not run"):
        assert not cpu.available()


@pytest.mark.parametrize("change", ["flags", "machine", "source"])
def test_a_cache_of_something_else_does_not(fresh, monkeypatch, tmp_path, change):
    _stats()
    monkeypatch.setenv("CXX", "no-such-compiler")
    if change == "flags":
        monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-DOTHER"))
    elif change == "machine":
        monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    else:
        shutil.copytree(build.CSRC, tmp_path / "csrc")
        (tmp_path / "csrc" / "row_kernels.h").open("a").write("\n")
        monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    _forget()
    with pytest.warns(RuntimeWarning, match="slower PyTorch path"):
        assert not cpu.available()


def test_the_cache_folder_may_start_with_a_tilde(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEGATRON_PLUGIN_CACHE", "~/kernels")
    _stats()
    assert len(list((tmp_path / "home" / "kernels").glob("*.so"))) == 1 and not (Path.cwd() / "~").exists()


def test_other_flags_are_another_object(fresh, monkeypatch):
    _stats()
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-DOTHER"))
    _forget()
    _stats()
    assert len(list(fresh.glob("*.so"))) == 2


def test_a_cache_folder_that_cannot_be_written(fresh, tmp_path):
    fresh.write_text("a file where the folder should be")
    expected = _stats()
    assert backend.select(torch.randn(2, 2)) == "cpp" and expected.isfinite().all()
    (folder,) = tmp_path.glob("megatron_plugin-*")
    assert len(list(folder.glob("*.so"))) == 1 and folder.stat().st_mode & 0o077 == 0


def test_a_temporary_folder_of_others_is_not_trusted(fresh, tmp_path):
    fresh.write_text("a file where the folder should be")
    foreign = build.folders()[1]
    foreign.mkdir()
    foreign.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="belongs to others or can be written by them.*name a writable one in MEGATRON_PLUGIN_CACHE"):
        assert not cpu.available()


def test_two_processes_build_at_once(fresh):
    """Both start from an empty folder, load what they built, and leave the one object."""
    program = "from megatron_plugin.kernels import cpu; cpu.FLAGS = ('-O0', *cpu.FLAGS[1:]); assert cpu.available(); print(cpu.supported_isas())"
    started = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    assert answers[0][0] == answers[1][0] == f"{cpu.supported_isas()}\n"
    (path,) = fresh.iterdir()
    assert build._intact(path)


def test_the_sources_are_found_from_the_package():
    """megatron_plugin/csrc is a link to csrc/, as kernels/ is; both travel in the wheel (pyproject, package-data)."""
    assert (ROOT / "megatron_plugin" / "csrc").is_symlink() and (ROOT / "megatron_plugin" / "csrc").resolve() == ROOT / "csrc"
    assert (build.CSRC / "token_stats_cpu.cpp").is_file()
