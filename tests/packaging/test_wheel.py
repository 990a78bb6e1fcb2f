"""What users get: an sdist and a wheel, in an environment of its own and away from the checkout.

The environment sees this one's packages but not its megatron_plugin: nothing is downloaded but setuptools, once (tests/wheels.py)."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from megatron_plugin import __version__
from tests.wheels import fetch_packages

ROOT = Path(__file__).parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "kernels", "csrc", "configs", "megatron_plugin")
SETUPTOOLS = "setuptools==80.10.2"  # that of requirements/py312-cuda13.txt; pyproject.toml asks for 77 or newer
NOT_OURS = ("PYTHON", "RANK", "WORLD_SIZE", "LOCAL_", "TORCHELASTIC", "TRITON_INTERPRET", "COV_")
CALL = """
import sys, torch, megatron_plugin
from megatron_plugin import token_loss
from megatron_plugin.kernels.backend import select
logits, labels = torch.randn(5, 97, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1, 4, -100, 5])
logits.requires_grad_()
out = token_loss(logits, labels, "dft")
out.loss_sum.backward()
logp = logits.detach().double().log_softmax(-1)[[0, 1, 2, 4], [3, 1, 4, 5]]
assert abs(float(out.loss_sum) + float((logp.exp() * logp).sum())) < 1e-5 and logits.grad[3].abs().sum() == 0
assert "megatron.core" not in sys.modules and "transformers" not in sys.modules
print(megatron_plugin.__file__, select(logits))
"""


def said(*command: object, cwd: Path, **environment: str) -> str:
    """What a command prints, started from `cwd` with nothing of this process in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The sdist, the wheel made from it, and the wheel made from the tree itself."""
    tools, room = fetch_packages(SETUPTOOLS), tmp_path_factory.mktemp("build")
    tree = room / "tree"
    tree.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / part)
    for out, options in (("dist", ()), ("straight", ("--wheel",))):
        said(sys.executable, "-m", "build", "--no-isolation", "--outdir", room / out, *options, tree, cwd=room, PYTHONPATH=str(tools))
    return {"sdist": next(room.glob("dist/*.tar.gz")), "wheel": next(room.glob("dist/*.whl")), "straight": next(room.glob("straight/*.whl"))}


def test_the_wheel_holds_every_file_that_is_read_at_run_time(built):
    found = set(members(built["wheel"]))
    package = ROOT / "megatron_plugin"
    # rglob stays outside links: kernels/, csrc/ and configs/ are read where they are
    expected = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")} | {"megatron_plugin/py.typed"}
    expected |= {f"megatron_plugin/{path.relative_to(ROOT)}" for folder in ("kernels/*.py", "csrc/*", "configs/*") for path in ROOT.glob(folder) if path.is_file()}
    assert expected - found == set()
    assert {name.rpartition(".")[2] for name in expected} >= {"py", "cpp", "h", "cu", "cuh", "yaml", "typed"} and len(expected) > 180
    assert f"megatron_plugin-{__version__}.dist-info/licenses/LICENSE" in found
    assert {name.split("/")[0] for name in found} == {"megatron_plugin", f"megatron_plugin-{__version__}.dist-info"}, "nothing beside the package: no `kernels`"


def test_the_sdist_makes_the_same_wheel_as_the_tree(built):
    through, straight = members(built["wheel"]), members(built["straight"])
    assert through.keys() == straight.keys()
    assert [name for name in through if through[name] != straight[name]] == []
    with tarfile.open(built["sdist"]) as archive:
        links = [member.name for member in archive if member.issym() or member.islnk()]
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not links, "links would break where they are not supported"
    assert {"LICENSE", "README.md", "pyproject.toml", "megatron_plugin/csrc/token_stats_cpu.cpp", "megatron_plugin/kernels/row.py"} <= names


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> tuple[Path, Path]:
    """(bin directory of an environment with the wheel of the sdist, an empty directory to work in)."""
    room = tmp_path_factory.mktemp("elsewhere")
    said(sys.executable, "-m", "venv", "--without-pip", room / "env", cwd=room)
    said(sys.executable, "-m", "pip", "--python", room / "env/bin/python", "install", "--no-deps", "--no-index", "--quiet", built["wheel"], cwd=room)
    site = next(room.glob("env/lib/python*/site-packages"))
    (site / "below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # comes behind: our own package is the installed one
    (room / "work").mkdir()
    return room / "env/bin", room / "work"


def test_the_command_and_the_module_say_their_version(installed):
    binaries, work = installed
    for command in ([binaries / "megatron-plugin"], [binaries / "python", "-m", "megatron_plugin"], [binaries / "python", "-m", "megatron_plugin.cli"]):
        assert said(*command, "--version", cwd=work) == f"megatron-plugin {__version__}\n"


def test_it_compiles_its_kernels_and_a_loss_is_right(installed):
    """doctor compiles them, into a cache that is new; the call then uses them."""
    binaries, work = installed
    cache = {"MEGATRON_PLUGIN_CACHE": str(work / "cache")}
    report = said(binaries / "megatron-plugin", "doctor", cwd=work, **cache)
    assert "BROKEN" not in report
    if shutil.which(os.environ.get("CXX", "c++")):
        assert "on CPU tensors: cpp" in report and len(list((work / "cache").glob("*.so"))) >= 1
    place, backend = said(binaries / "python", "-c", CALL, cwd=work, **cache).split()
    assert Path(place).is_relative_to(binaries.parent) and f"on CPU tensors: {backend}" in report


def test_it_trains_with_a_configuration_it_brings(installed):
    binaries, work = installed
    assert "configs/debug_cpu.yaml" in said(binaries / "megatron-plugin", "config", "init", cwd=work).splitlines()
    assert {path.name: path.read_bytes() for path in (work / "configs").iterdir()} == {
        path.name: path.read_bytes() for path in (ROOT / "configs").iterdir() if path.suffix in (".yaml", ".md")
    }
    small = ("train.steps=2", "train.warmup_steps=0", "train.global_batch=4", "train.eval_interval=2", "data.eval_samples=2")
    said(binaries / "megatron-plugin", "train", "configs/debug_cpu.yaml", *small, cwd=work, OMP_NUM_THREADS="1")
    run = work / "runs/debug_cpu"
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 2 and (run / "report.html").stat().st_size > 10_000
