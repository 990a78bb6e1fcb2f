"""A page: Markdown with figures becomes one HTML file that holds everything, loads nothing and runs nothing.

What people and models wrote goes through `quoted` or `cell`; should markup slip through all the same, the renderer escapes HTML, and the page's
content policy forbids every request and every script.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

__all__ = ["cell", "quoted", "write_page"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .8rem 0; } th, td { padding: .2rem .7rem; border-bottom: 1px solid #e5e5e5; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } img { max-width: 100%; }
pre { background: #f6f6f6; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; } pre { background: #242424; } th, td, h2 { border-color: #3a3a3a; }
  img { background: #fff; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PICTURE = re.compile(r'<img src="([^"]+\.png)"')


def write_page(path: str | Path, markdown: str, *, title: str) -> Path:
    """Write `markdown` as HTML.  ![...](x.png) is read from beside `path` and embedded; the file appears at once or not at all.

    FileNotFoundError for a picture that is not there."""
    from markdown_it import MarkdownIt

    path = Path(path)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = PICTURE.sub(lambda found: f'<img src="{_embedded(path.parent / found[1])}"', body)
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f'<meta name="viewport" content="width=device-width"><title>{_escaped(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n')  # fmt: skip
    writing = path.with_name(f".{path.name}.writing")
    writing.write_text(page, "utf-8", errors="replace")  # halves of surrogate pairs, which a byte-level tokenizer can end an answer with
    os.replace(writing, path)
    return path


def quoted(text: str) -> str:
    """`text`, whatever it is, as a block of a page."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def cell(text: str) -> str:
    """`text` as a cell of a table: one line, without what cannot be seen, its markup shown and not obeyed."""
    plain = "".join("\\n" if c == "\n" else c for c in text if c.isprintable() or c == "\n")
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", plain)


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
