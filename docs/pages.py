"""What mkdocs.yml needs beside its packages: a package that can be read file by file, docstrings as the plain text they are, pictures from
benchmarks/, and the commands' own help."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PICTURE = re.compile(r"\]\(\.\./(benchmarks/results/[\w.-]+\.png)\)")
READ = ROOT / "build/api"  # mkdocs.yml names it too
COMMANDS = "<!-- commands -->"
NEW_PARAGRAPH = re.compile(r"[A-Z]\w*Error\b|Returns?\b")
"""What a docstring says at the end of a list of parameters, at the beginning of a line."""


def on_startup(**_: Any) -> None:
    """A copy of the package whose kernels/ has an __init__.py: without one the reader of docstrings passes a folder by."""
    shutil.rmtree(READ, ignore_errors=True)
    shutil.copytree(ROOT / "megatron_plugin", READ / "megatron_plugin", ignore=shutil.ignore_patterns("__pycache__", "csrc", "configs"))
    (READ / "megatron_plugin/kernels/__init__.py").touch()


def on_files(files: Files, config: Any) -> Files:
    """Pictures that pages show from outside docs/ come along."""
    for page in Path(config["docs_dir"]).rglob("*.md"):
        for name in PICTURE.findall(page.read_text("utf-8")):
            if not files.get_file_from_path(name):
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to those pictures, and the help of every command in the place that asks for it."""
    up = "../" * page.file.src_uri.count("/")
    markdown = PICTURE.sub(lambda found: f"]({up}{found[1]})", markdown)
    return markdown.replace(COMMANDS, _commands()) if COMMANDS in markdown else markdown


def _commands() -> str:
    from megatron_plugin.cli.commands import parser

    os.environ["COLUMNS"] = "110"  # argparse wraps at the terminal's width, which the site has not
    return "\n".join(_help(parser(), "megatron-plugin"))


def _help(parser: argparse.ArgumentParser, name: str) -> list[str]:
    lines = [f"## {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                lines += _help(below, f"{name} {command}")
    return lines


class PlainText(griffe.Extension):
    """Our docstrings are plain text with `names` in backticks: said to Markdown, so that it eats no *, _ or <, and keeps lists and examples apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            parameters = {p.name for p in obj.parameters} if isinstance(obj, (griffe.Function, griffe.Class)) else set()
            obj.docstring.value = as_markdown(obj.docstring.value, parameters)


def as_markdown(text: str, parameters: set[str]) -> str:
    """Items for lines 'name: ...' or 'a, b: ...' of parameters, examples for lines indented by four, a paragraph for what is raised."""
    lines: list[str] = []
    inside = ""
    for line in text.splitlines():
        bare = line.strip()
        if not bare:
            lines.append("")
            inside = "code" if inside == "code" else ""
            continue
        kind = _kind(line, parameters, inside)
        if inside == "code" and kind != "code":
            lines += ["```", ""]
        if kind == "code" and inside != "code":
            lines += ["", "```text"]
        elif kind not in (inside, "code", "more"):
            lines.append("")
        names, _, rest = bare.partition(": ")
        said = {"code": line[4:], "item": f"- **{_code(names)}**: {_escaped(rest)}", "more": f"  {_escaped(bare)}"}
        lines.append(said.get(kind, _escaped(bare)))
        inside = {"item": "list", "more": "list"}.get(kind, kind)
    return "\n".join(lines + ["```"] * (inside == "code"))


def _kind(line: str, parameters: set[str], inside: str) -> str:
    """code, item, more (of an item) or text."""
    if line.startswith("    "):
        return "code"
    names, colon, _ = line.partition(": ")
    if colon and parameters and {name.strip(" *`") for name in names.split(",")} <= parameters:
        return "item"
    return "more" if inside == "list" and not NEW_PARAGRAPH.match(line) else "text"


def _escaped(text: str) -> str:
    """Outside `names`, no character means anything to Markdown or HTML."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else re.sub(r"([*_\[\]#|~])", r"\\\1", part).replace("<", "&lt;") for i, part in enumerate(parts))


def _code(names: str) -> str:
    return ", ".join(f"`{name.strip(' `')}`" for name in names.split(","))
