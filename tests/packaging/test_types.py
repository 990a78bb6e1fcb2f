"""What a type checker and an editor see of the package, whose public names are resolved at run time."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_plugin

ROOT = Path(__file__).parents[2]
PROGRAM = '''
from megatron_plugin import LossOutput, TokenInputs, TokenStats, TokenTerms, bind, mu_schedule, token_loss
import torch

def mine(stats: TokenStats, inputs: TokenInputs, *, power: float = 2.0) -> TokenTerms:
    return TokenTerms(loss=-stats.logp * power)

def step(logits: torch.Tensor, labels: torch.Tensor) -> LossOutput:
    out = token_loss(logits, labels, bind(mine, power=1.5), inputs=TokenInputs(coefficient=torch.ones(3)))
    reveal_type(out.metric_sums)
    reveal_type(mu_schedule(3, warmup_steps=1, decay_steps=2, peak=0.9, valley=0.1))
    return out
'''
WRONG = {
    "token_loss(logits, labels, 3)": "arg-type",
    "token_loss(logits, labels, 'dft', temprature=2.0)": "call-arg",
    "token_loss(logits, labels, 'dft').loss": "attr-defined",
    "TokenInputs(torch.ones(3))": "call-arg",
}


@pytest.mark.parametrize("package", ["megatron_plugin", "megatron_plugin.hooks.weights"])
def test_the_names_for_type_checkers_are_the_public_ones(package):
    """_HOME, which is run, and the imports under TYPE_CHECKING, which are read, say the same of each name."""
    path = ROOT / package.replace(".", "/") / "__init__.py"
    tree = ast.parse(path.read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    read = {alias.name: node.module for node in block.body for alias in node.names}
    (home,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME")
    assert read == {name: f"{package}.{module}" for name, module in home.items()}
    assert all(alias.asname == alias.name for node in block.body for alias in node.names), "as itself: re-exported"


def test_importing_the_package_still_imports_no_torch():
    code = "import sys, megatron_plugin; print(len(dir(megatron_plugin)), 'torch' in sys.modules, 'omegaconf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split()[1:] == ["False", "False"]


def test_a_program_that_uses_it_is_checked(tmp_path):
    """mypy on somebody's program: right calls pass with their types known, and each wrong one is found.  torch's own types are left out, for time."""
    wrong = [f"{call}  # {code}" for call, code in WRONG.items()]
    (tmp_path / "program.py").write_text(PROGRAM + "\ndef wrong(logits: torch.Tensor, labels: torch.Tensor) -> None:\n    " + "\n    ".join(wrong) + "\n")
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n[mypy-torch.*,megatron.*,triton.*]\nfollow_imports = skip\n")
    line = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(tmp_path / "cache"), "--no-error-summary", "program.py"]
    done = subprocess.run(line, cwd=tmp_path, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=120)
    assert (megatron_plugin.__path__[0] == str(ROOT / "megatron_plugin")) and (ROOT / "megatron_plugin/py.typed").is_file()
    said = done.stdout.splitlines()
    revealed = [text.partition("Revealed type is ")[2].replace("builtins.", "") for text in said if "Revealed" in text]
    assert revealed == ['"dict[str, Any]"', '"float"'], done.stdout + done.stderr
    first = len((PROGRAM + "\ndef wrong").splitlines()) + 1
    for number, (call, code) in enumerate(WRONG.items(), first):
        assert any(text.startswith(f"program.py:{number}: error") and f"[{code}]" in text for text in said), f"{call}: not found in\n{done.stdout}"
    errors = [text for text in said if ": error" in text]
    assert len({text.split(":")[1] for text in errors}) == len(WRONG), done.stdout
