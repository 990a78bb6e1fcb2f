"""Imports point down only (CONTRIBUTING.md, layers).  Read from the source, so a lazy import inside a function counts too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = "megatron_plugin"
# a module may import its own layer and those below; what lies outside the project is listed by the rooms that may use it
LAYERS = [["kernels", "csrc"], ["losses", "schedules", "data", "config"], ["parallel", "ops"], ["hooks", "rollout"], ["report"], ["trainer"], ["cli", "doctor", "bench"]]
ONLY_IN = {
    "megatron": ["hooks", "trainer"],
    "vllm": ["rollout"],
    "triton": ["kernels"],
    "torch.distributed": ["parallel", "ops", "hooks", "rollout", "trainer"],
}


def _layer(module: str) -> int | None:
    part = module.split(".")[1] if "." in module else ""
    return next((i for i, names in enumerate(LAYERS) if part in names), None)


def _modules() -> dict[str, Path]:
    files = [p for p in (ROOT / OURS).rglob("*.py") if "kernels" not in p.parts[len(ROOT.parts) + 1 :]] + list((ROOT / "kernels").glob("*.py"))
    return {".".join((OURS, *p.relative_to(ROOT).with_suffix("").parts)).replace(f"{OURS}.{OURS}", OURS): p for p in files}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module, path", sorted(_modules().items()), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_down(module, path):
    layer = _layer(module)
    for imported in _imports(path):
        if imported.startswith(f"{OURS}.") and layer is not None and _layer(imported) is not None:
            assert _layer(imported) <= layer, f"{module} (layer {layer}) imports {imported} (layer {_layer(imported)}), which lies above it"
        for package, rooms in ONLY_IN.items():
            if imported == package or imported.startswith(f"{package}."):
                assert module.split(".")[1] in rooms, f"{module} imports {imported}; only {', '.join(rooms)} may"


def test_hooks_and_rollout_do_not_know_each_other():
    for module, path in _modules().items():
        for side, other in (("hooks", "rollout"), ("rollout", "hooks")):
            if module.startswith(f"{OURS}.{side}"):
                assert not any(i.startswith(f"{OURS}.{other}") for i in _imports(path)), module


def test_the_kernels_link():
    """A root package called kernels would shadow Hugging Face's, and break transformers and vLLM started from here."""
    assert (ROOT / OURS / "kernels").is_symlink() and (ROOT / OURS / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_layer_rule_can_fail(tmp_path):
    bad = tmp_path / "x.py"
    bad.write_text("def f():\n    from megatron_plugin.trainer.loop import train\n")
    assert _imports(bad) == {"megatron_plugin.trainer.loop.train"} and _layer("megatron_plugin.trainer.loop.train") > _layer("megatron_plugin.losses.dft")
    assert len(_modules()) > 20
