"""What the package must not contain, read from its source; what is tried at run time: tests/faults/payloads.py and exposure.py."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "megatron_plugin").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
UNPICKLER = "megatron_plugin/hooks/checkpoint_pickles.py"
"""Reads the pickles of megatron-core's format, with find_class limited to the classes of the format."""
MODULES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle")
CALLS = ("eval", "exec", "__import__")
FUNCTIONS = ("os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.package", "numpy.load",
             "np.load", "torch.hub.load", "subprocess.getoutput", "tempfile.mktemp")  # fmt: skip
NAMES = ("UnsafeLoader", "FullLoader", "PickleSerializer", "register_new_resolver", "register_resolver")
VARIABLE = "VLLM_ALLOW_INSECURE_SERIALIZATION"


def faults(source: str, name: str) -> list[str]:
    """What is wrong with a file: "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        said = _imports(node, name) or _call(node, name) if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)) else _rest(node, name)
        found += [f"{name}:{node.lineno}: {said}"] if said else []
    return found


def _imports(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.Call):
        return ""
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    bad = [module for module in modules if module.split(".")[0] in MODULES and not (name == UNPICKLER and module == "pickle")]
    bad += [alias.name for alias in node.names if alias.name in NAMES]
    return ", ".join(bad)


def _call(node: ast.AST, name: str) -> str:
    if not isinstance(node, ast.Call):
        return ""
    function = ast.unparse(node.func)
    values = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if function in CALLS or function in FUNCTIONS or function.startswith("pickle."):
        return function
    if function in ("torch.load", "torch.jit.load") and (name != UNPICKLER or values.get("weights_only") != "True"):
        return f"{function} outside {UNPICKLER}, or without weights_only=True"
    for keyword, safe in {"shell": "False", "trust_remote_code": "False", "weights_only": "True", "allow_pickle": "False"}.items():
        if values.get(keyword, safe) != safe:
            return f"{keyword}={values[keyword]}"
    if function.endswith(".from_pretrained") and values.get("local_files_only") != "True":
        return f"{function} without local_files_only=True"
    return ""


def _rest(node: ast.AST, name: str) -> str:
    """Names and texts: the variable may only be named where it is refused, and in a message."""
    if isinstance(node, (ast.Name, ast.Attribute)) and (node.id if isinstance(node, ast.Name) else node.attr) in NAMES:
        return ast.unparse(node)
    if isinstance(node, ast.Constant) and node.value == VARIABLE and name != "megatron_plugin/rollout/vllm_process.py":
        return VARIABLE
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.lstrip("-").replace("-", "_") == "trust_remote_code":
        return node.value
    return ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_package_can_run_what_it_reads(path):
    assert faults(path.read_text(), str(path.relative_to(ROOT))) == []


BAD = [
    "import pickle", "from pickle import loads", "import torch\ntorch.load(path, weights_only=True)", "eval(text)", "exec(text)", "__import__(name)",
    "import os\nos.system(text)", "import yaml\nyaml.load(text)", "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)", "from yaml import FullLoader",
    "run(text, shell=True)", "run(text, shell=asked)", "make(trust_remote_code=True)", "make(trust_remote_code=config.trust)", "arguments['--trust-remote-code'] = 1",
    "arguments |= {'trust-remote-code': ''}", "load(path, weights_only=False)", "os.environ['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'",
    "import numpy as np\nnp.load(path)", "load(path, allow_pickle=True)", "OmegaConf.register_new_resolver('env', f)", "AutoConfig.from_pretrained(path)",
]  # fmt: skip


@pytest.mark.parametrize("source", BAD)
def test_the_rule_can_fail(source):
    assert faults(source, "megatron_plugin/x.py")


def test_the_one_file_that_unpickles_may_not_do_it_freely():
    source = (ROOT / UNPICKLER).read_text()
    for more in ("pickle.load(file)", "pickle.loads(data)", "pickle.Unpickler(file).load()", "torch.load(path)", "torch.load(path, weights_only=False)"):
        assert faults(f"{source}\n{more}\n", UNPICKLER)
    assert "def find_class(" in source


def test_the_page_is_there_and_names_what_it_must():
    text = (ROOT / "SECURITY.md").read_text()
    for word in ("torch.distributed", "trust_remote_code", VARIABLE, "VLLM_SERVER_DEV_MODE", "127.0.0.1", "--public", "rollout.bind", "rollout.reward_network",
                 "oc.env", "safetensors", "Report a vulnerability"):  # fmt: skip
        assert word in text, word
    for path in ("tests/faults/payloads.py", "tests/test_security.py", UNPICKLER.removeprefix("megatron_plugin/")):
        assert path in text and ((ROOT / path).exists() or (ROOT / "megatron_plugin" / path).exists())
