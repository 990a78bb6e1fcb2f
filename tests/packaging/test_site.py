"""The pages of docs/ and the API from the docstrings: built with every warning an error, and nothing of a docstring lost on the way."""

import html
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^::: ([\w.]+)$", re.M)

if missing := [name for name in ("mkdocs", "material", "mkdocstrings", "griffe") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"the packages of the extra 'docs' are not here: {', '.join(missing)}", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-1000:]
    return out


def words(page: Path) -> str:
    """The text of a page as one line."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", page.read_text("utf-8"), flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_every_public_name_is_on_a_page():
    import megatron_plugin
    from megatron_plugin import data
    from megatron_plugin.hooks import weights

    named = [mark for page in (ROOT / "docs/api").glob("*.md") for mark in MARK.findall(page.read_text())]
    pages = {tuple(mark.rsplit(".", 1)) for mark in named}
    modules = set(named)
    for name, home in megatron_plugin._HOME.items():
        found = getattr(importlib.import_module(f"megatron_plugin.{home}"), name)
        place = getattr(found, "__module__", f"megatron_plugin.{home}")
        assert name == "LOSSES" or (place, name) in pages or place in modules, f"{name} ({place}) is on no page of docs/api/"
    for loss in megatron_plugin.LOSSES.values():
        assert (loss.fn.__module__, loss.name) in pages, f"loss {loss.name} is on no page"
    for package in (data, weights):
        for name in package.__all__:
            place = getattr(getattr(package, name), "__module__", None)
            if place and place.startswith("megatron_plugin"):
                assert place in modules or (place, name) in pages or place.endswith(("arithmetic", "load", "hf_config")), f"{place}.{name} is on no page"


def test_what_the_docstrings_say_arrives(site):
    """Words of docstrings that Markdown would have eaten: stars, brackets, angles, tables of four spaces, a list of parameters."""
    ops, losses, hooks = (words(site / f"api/{name}/index.html") for name in ("ops", "losses", "hooks"))
    assert "logits [..., V_local] fp32, bf16, fp16, or fp64 (not in Triton); labels [...] integer ids" in ops
    assert "softmax(softcap tanh((h W^T + bias) / softcap) / temperature)" in ops and "max(|a|, |b|, |c|)" in ops
    assert "own answer, wrong +max(log p, wrong_floor) -min(r A, clip(r) A) where A <= 0" in losses
    assert "handle = attach(model" in hooks
    source = (site / "api/losses/index.html").read_text()
    assert re.search(r"<li>\s*(<p>)?<strong><code>params</code></strong>", source), "parameters are items of a list"
    assert re.search(r"<pre[^>]*>(?:(?!</pre>).)*own answer, wrong", source, re.S), "what is laid out in columns stays in columns"


def test_the_commands_are_those_of_the_program(site):
    from megatron_plugin.cli.commands import parser

    page = words(site / "api/cli/index.html")
    (commands,) = (action.choices for action in parser()._actions if action.dest != "help" and action.choices)
    assert len(commands) >= 9
    for name in commands:
        assert f"usage: megatron-plugin {name}" in page


def test_nothing_comes_from_other_hosts(site):
    page = (site / "api/ops/index.html").read_text()
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!127)[^"]+"', page.replace('rel="canonical"', ""))
    assert len(list(site.glob("benchmarks/results/*.png"))) >= 5 and "../benchmarks/results/" in (site / "replication/index.html").read_text()
