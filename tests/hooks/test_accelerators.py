"""Transformer Engine and apex, played by stand-ins on the Python path: no build of either runs on a CPU.  megatron-core is the real one, in
a process of its own, because what it finds is decided at its import.  What a stand-in raises is what the real package was seen to raise
(transformer-engine 2.20.2 and apex 0.9.10.dev0 from PyPI, without their dependencies)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMPTY_TE = {"transformer_engine/__init__.py": "raise RuntimeError('Found empty `transformer-engine` meta package installed. Install ...')"}
TE_OF_ANOTHER_TORCH = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": "raise OSError('libtransformer_engine.so: undefined symbol: _ZN2at4_ops5empty')",
}
TE_OF_ANOTHER_CUDA = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": "raise ImportError('libcudart.so.12: cannot open shared object file')",
}
TE_WITHOUT_TORCH_PART = {
    "transformer_engine/__init__.py": "__version__ = '2.9.0'",
    "transformer_engine/pytorch/__init__.py": "import transformer_engine_torch",
}
TE_WITHOUT_A_DEPENDENCY = {"transformer_engine/__init__.py": "import pydantic_of_another_world"}
WORKING_TE = {
    # every name megatron-core asks for is there: a class when it begins with a capital, else something to call and to take names from
    "transformer_engine/__init__.py": """
import importlib.machinery, sys, types, torch
__version__ = "2.9.0"
class Anything(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (torch.nn.Module,), {"__module__": self.__name__}) if name[0].isupper() else Anything(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made
    def __call__(self, *arguments, **keywords): ...
class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("transformer_engine.") else None
    def create_module(self, spec):
        return Anything(spec.name)
    def exec_module(self, module): ...
sys.meta_path.insert(0, Finder())
from . import common, pytorch
"""
}
WEB_TOOLKIT = {"apex/__init__.py": "", "apex/views.py": ""}
WEB_TOOLKIT_ALONE = {"apex/__init__.py": "from pyramid_mailer.interfaces import IMailer"}
WEB_TOOLKIT_TOO_OLD = {"apex/__init__.py": "raise AttributeError('collections.MutableMapping')"}
APEX = {
    "apex/__init__.py": "",
    "apex/multi_tensor_apply/__init__.py": "def multi_tensor_applier(*arguments): ...",
    "apex/optimizers/__init__.py": "class FusedAdam: ...\nclass FusedSGD: ...",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "class FusedLayerNormAffineFunction: ...",
}
AMP_C = {"amp_C.py": "def multi_tensor_l2norm(*a): ...\ndef multi_tensor_scale(*a): ..."}

IMPORT = "import warnings; warnings.simplefilter('ignore')\nfrom megatron_plugin.hooks import accelerators\n"
SAY = IMPORT + "print(*accelerators.check_accelerators(), sep='\\n')\n"
GPU = "import torch; torch.cuda.is_available = lambda: True\n"
LAYER = """
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron_plugin.hooks.local_spec import block_spec
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
spec = block_spec(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
print(spec.layer_specs[0].submodules.self_attention.submodules.linear_qkv.__name__, spec.layer_norm.__name__)
"""


@pytest.fixture
def python(tmp_path):
    """python(packages, *arguments): (exit code, stdout, stderr) of Python with those packages first on its path."""

    def run(packages, *arguments):
        for name, text in packages.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=200, cwd=ROOT,
                              env=environment | {"PYTHONPATH": str(tmp_path)})  # fmt: skip
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    return run


def test_neither_is_needed(python):
    code, out, err = python({}, "-c", SAY + "print(accelerators.transformer_engine(), accelerators.apex(), accelerators.start_up_line(), sep='\\n')")
    assert (code, out.splitlines()) == (0, [
        "Transformer Engine absent", "apex absent",
        "layers: megatron-core's local spec with torch norms; Adam of torch, gradient norm of megatron-core, norms of stock specs of torch; "
        "fused weight-gradient GEMM not there",
    ]), err  # fmt: skip


@pytest.mark.parametrize("packages, got", [
    (EMPTY_TE, "the empty package from PyPI is installed, without the library"),
    (TE_OF_ANOTHER_TORCH, "'import transformer_engine.pytorch' raises OSError: libtransformer_engine.so: undefined symbol"),
    (TE_OF_ANOTHER_CUDA, "'import transformer_engine.pytorch' raises ImportError: libcudart.so.12: cannot open"),
    (TE_WITHOUT_TORCH_PART, "'import transformer_engine.pytorch' raises ModuleNotFoundError: No module named 'transformer_engine_torch'"),
    (WEB_TOOLKIT_TOO_OLD, "its import raises AttributeError, and megatron.core's with it"),
])  # fmt: skip
def test_what_makes_megatron_core_impossible_to_import(python, packages, got):
    ask = "try:\n    accelerators.check_accelerators()\nexcept accelerators.AcceleratorError as error:\n    print(error)\n"
    code, out, err = python(packages, "-c", IMPORT + ask + "import megatron.core.models.gpt")
    assert got in out and "pip uninstall" in out and len(out.splitlines()) == 1
    assert code == 1, "the premise: no 'except ImportError' of megatron-core catches it"


def test_the_command_says_it_in_one_line_and_exits_2(python):
    code, out, err = python(EMPTY_TE, "-m", "megatron_plugin.cli", "train", "configs/debug_cpu.yaml")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("megatron-plugin: error: Transformer Engine") and "'pip uninstall transformer-engine'" in err
    code, out, err = python(EMPTY_TE, "-m", "megatron_plugin.cli", "doctor")
    broken = [line for line in out.splitlines() if line.startswith("BROKEN")]
    assert code == 2 and [line.split()[1] for line in broken] == ["Transformer", "megatron-core"] and "see above" in broken[1]
    assert "broken here: Transformer Engine, megatron-core" in err


def test_a_transformer_engine_that_megatron_core_goes_without(python):
    """megatron-core goes without it, silently; we say so."""
    code, out, err = python(TE_WITHOUT_A_DEPENDENCY, "-c", GPU + SAY + "print(accelerators.transformer_engine_usable())" + LAYER)
    assert code == 0, err
    line, usable, layer = out.splitlines()
    assert (usable, layer) == ("False", "ColumnParallelLinear LayerNorm")
    assert line.startswith("Transformer Engine unused ('import transformer_engine' raises ModuleNotFoundError: No module named 'pydantic")
    assert "install transformer_engine[pytorch] built for this torch and CUDA" in line


def test_transformer_engine_is_picked_where_it_works(python):
    lines = "print(accelerators.start_up_line())\nprint(accelerators.start_up_line(packed=True))"
    code, out, err = python(WORKING_TE, "-c", GPU + SAY + lines + LAYER)
    assert code == 0, err
    whole, packed, layer = out.splitlines()[-3:]
    assert whole == ("layers: Transformer Engine; Adam of Transformer Engine, gradient norm of Transformer Engine, norms of stock specs of "
                     "Transformer Engine; fused weight-gradient GEMM not there")  # fmt: skip
    assert packed.startswith("layers: megatron-core's local spec with torch norms; Adam of Transformer Engine")
    assert layer == "TELayerNormColumnParallelLinear TENorm"


def test_transformer_engine_is_not_picked_without_a_gpu(python):
    code, out, err = python(WORKING_TE, "-c", SAY + "print(accelerators.transformer_engine_usable())" + LAYER)
    assert code == 0, err
    line, usable, layer = out.splitlines()
    assert (usable, layer) == ("False", "ColumnParallelLinear LayerNorm")
    assert line.startswith("Transformer Engine unused (no GPU here")


@pytest.mark.parametrize("packages, message", [
    (WEB_TOOLKIT, "megatron-core takes it for NVIDIA's and chooses norms that cannot be built: 'pip uninstall apex'"),
    (APEX, "its CUDA extensions do not import (ModuleNotFoundError: No module named 'amp_C'), and megatron-core would choose its FusedAdam"),
])  # fmt: skip
def test_an_apex_that_is_not_the_one(python, packages, message):
    code, out, err = python(packages, "-c", SAY)
    assert code == 1 and "AcceleratorError: apex" in err and message in err and "NVIDIA's is built from source" in err


def test_pypis_apex_breaks_megatron_cores_own_norms(python):
    """The premise of the refusal, on the real megatron-core."""
    code, out, err = python(WEB_TOOLKIT, "-c", IMPORT + (
        "from megatron.core.models.gpt import gpt_layer_specs as specs\nfrom megatron.core.transformer import TransformerConfig\n"
        "print(specs.HAVE_APEX)\nspecs.LNImpl(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), 8)"
    ))  # fmt: skip
    assert code == 1 and out == "True" and "Apex must be installed to use FusedLayerNorm" in err


def test_pypis_apex_without_its_dependencies_is_only_named(python):
    code, out, err = python(WEB_TOOLKIT_ALONE, "-c", SAY + "import megatron.core.models.gpt.gpt_layer_specs as s; print(s.HAVE_APEX)")
    assert code == 0, err
    line, have = out.splitlines()
    assert have == "False"
    assert line.startswith("apex unused (") and "it does not import, so megatron-core goes without it; 'pip uninstall apex'" in line


def test_apex_is_reported_when_megatron_core_picks_it(python):
    code, out, err = python(APEX | AMP_C, "-c", SAY + "print(accelerators.apex(), accelerators.start_up_line(), sep='\\n')")
    assert code == 0 and out.splitlines()[-2:] == [
        "apex works",
        "layers: megatron-core's local spec with torch norms; Adam of apex, gradient norm of apex, norms of stock specs of apex; "
        "fused weight-gradient GEMM not there",
    ], err  # fmt: skip


def test_faults_of_apex_do_not_matter_beside_transformer_engine(python):
    code, out, err = python(APEX, "-c", IMPORT + "print(accelerators.apex(te_works=True))")
    assert code == 0 and out.startswith("apex unused (its CUDA extensions do not import") and "Transformer Engine's parts are taken" in out, err
