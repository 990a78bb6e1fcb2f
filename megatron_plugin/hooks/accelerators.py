"""Transformer Engine and apex: whether they are here, whether they work, and what megatron-core picks of them.

Neither is needed.  megatron-core looks for them itself, in `try: import ... except ImportError`, and that leaves two traps which have to be
looked for before `import megatron.core`; so this module imports neither megatron nor torch at its top:

  the empty transformer-engine package   what `pip install transformer-engine` gives.  Its import raises RuntimeError, which no
                                         `except ImportError` catches: megatron.core itself cannot be imported.  The same with a build for
                                         another torch or CUDA, or one that lacks its torch part: some imports are not guarded at all.
  PyPI's `apex`                          a web toolkit.  Once it imports, megatron-core's HAVE_APEX is True and its local layer spec
                                         chooses a FusedLayerNorm that cannot be built.

Which combinations have run on a GPU: hooks/VERSIONS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["AcceleratorError", "Package", "apex", "check_accelerators", "megatron_core_version", "start_up_line", "transformer_engine",
           "transformer_engine_usable"]  # fmt: skip

NVIDIA_APEX = "NVIDIA's is built from source: github.com/NVIDIA/apex, with its C++ and CUDA extensions"


class AcceleratorError(RuntimeError):
    """An installed package with which megatron-core cannot be imported or builds what cannot run."""

    exit_code = 2


@dataclass(frozen=True)
class Package:
    """What was found under the name of an accelerator."""

    name: str
    state: str
    """absent; works; unused: installed, but megatron-core goes without it; breaks: megatron-core would stop over it."""
    version: str = ""
    problem: str = ""
    """Of `unused` and `breaks`: what was got, and the remedy."""

    def __str__(self) -> str:
        return " ".join(part for part in (self.name, self.version, self.state) if part) + (f" ({self.problem})" if self.problem else "")


def transformer_engine() -> Package:
    """Imports Transformer Engine, if it is there, as megatron-core will."""
    name, found = "Transformer Engine", _version("transformer_engine", "transformer-engine")
    if find_spec("transformer_engine") is None:
        return Package(name, "absent")
    remedy = "'pip uninstall transformer-engine', or install transformer_engine[pytorch] built for this torch and CUDA"
    module = "transformer_engine"
    try:
        import_module(module)
        import_module(module := "transformer_engine.pytorch")
    except Exception as error:  # RuntimeError of the empty package, OSError or ImportError of libraries that do not load
        got = f"'import {module}' raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if "meta package" in str(error):
            got = "the empty package from PyPI is installed, without the library"
        if isinstance(error, ModuleNotFoundError) and module == "transformer_engine":  # all that megatron-core catches in every place
            return Package(name, "unused", found, f"{got}; megatron-core goes without it; to change that, {remedy}")
        return Package(name, "breaks", found, f"{got}, and then megatron.core cannot be imported either: {remedy}")
    if not _has_gpu():
        problem = "no GPU here; our layers go without it, megatron-core still takes its optimizer: uninstall it for CPU runs"
        return Package(name, "unused", found, problem)
    return Package(name, "works", found)


def transformer_engine_usable() -> bool:
    """True when Transformer Engine imports and there is a GPU for it (it has no CPU path)."""
    return _has_gpu() and transformer_engine().state == "works"


def apex(*, te_works: bool = False) -> Package:
    """Looks at whatever `import apex` finds.  `te_works`: megatron-core takes Transformer Engine's parts first, so apex's faults do not matter."""
    spec, found = find_spec("apex"), _version("apex")
    if spec is None:
        return Package("apex", "absent")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return _foreign_apex(found, str(folders[0] if folders else spec.origin))
    try:
        import_module("apex.optimizers")
        import_module("amp_C")
    except Exception as error:
        got = f"its CUDA extensions do not import ({type(error).__name__}: {str(error)[:120]})"
        remedy = f"build it with them for this torch, or 'pip uninstall apex'. {NVIDIA_APEX}"
        if te_works:
            return Package("apex", "unused", found, f"{got}; Transformer Engine's parts are taken; {remedy}")
        return Package("apex", "breaks", found, f"{got}, and megatron-core would choose its FusedAdam, which then raises; {remedy}")
    return Package("apex", "works", found)


def _foreign_apex(found: str, place: str) -> Package:
    what = f"{place} is a package of that name without NVIDIA's multi_tensor_apply, such as PyPI's web toolkit"
    remedy = f"'pip uninstall apex', or take that folder from the Python path. {NVIDIA_APEX}"
    try:
        import_module("apex")
    except ImportError:
        return Package("apex", "unused", found, f"{what}; it does not import, so megatron-core goes without it; {remedy}")
    except Exception as error:
        return Package("apex", "breaks", found, f"{what}; its import raises {type(error).__name__}, and megatron.core's with it: {remedy}")
    return Package("apex", "breaks", found, f"{what}; megatron-core takes it for NVIDIA's and chooses norms that cannot be built: {remedy}")


def check_accelerators() -> list[str]:
    """Before `import megatron.core`.  Returns a line for each package that is installed and not used.

    AcceleratorError for one that megatron-core would stop over, naming the remedy."""
    te = transformer_engine()
    packages = [te, apex(te_works=te.state == "works")]
    for package in packages:
        if package.state == "breaks":
            raise AcceleratorError(f"{package.name} {package.version}: {package.problem}")
    return [str(package) for package in packages if package.state == "unused"]


def megatron_core_version() -> str:
    """Of the megatron-core that is imported, installed or not."""
    return import_module("megatron.core").__version__


def start_up_line(*, packed: bool = False) -> str:
    """One line on what megatron-core runs with, for the log.  `packed`: the layers take a block-diagonal mask, which only the local ones do."""
    layers = "Transformer Engine" if transformer_engine_usable() and not packed else "megatron-core's local spec with torch norms"
    parts = ", ".join(f"{what} of {whose}" for what, whose in selection().items())
    return f"layers: {layers}; {parts}; fused weight-gradient GEMM {'there' if find_spec('fused_weight_gradient_mlp_cuda') else 'not there'}"


def selection() -> dict[str, str]:
    """{part: whose} of what megatron-core chose when it was imported."""
    optimizer, clip = import_module("megatron.core.optimizer"), import_module("megatron.core.optimizer.clip_grads")
    block = import_module("megatron.core.transformer.transformer_block")
    parts = {"Adam": optimizer.Adam, "gradient norm": clip.l2_norm_impl, "norms of stock specs": block.LayerNormImpl}
    return {what: _owner(part) for what, part in parts.items()}


OWNERS = {"transformer_engine": "Transformer Engine", "apex": "apex", "amp_C": "apex", "torch": "torch", "megatron": "megatron-core"}
NORMS = {"FusedLayerNorm": "apex", "WrappedTorchNorm": "torch", "TENorm": "Transformer Engine"}  # megatron-core's wrappers of theirs


def _owner(part: Callable) -> str:
    module = getattr(part, "__module__", None) or type(part).__module__
    return NORMS.get(getattr(part, "__name__", "")) or OWNERS.get(module.split(".")[0], module)


def _version(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
