"""A page holds everything, and nothing in it is obeyed."""

import base64
import re

import pytest

from megatron_plugin.report.page import cell, quoted, write_page
from tests.report.runs import HOSTILE

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def test_pictures_are_inside(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    page = write_page(tmp_path / "x.html", "# Title\n\n![a](a.png)\n\n| a | b |\n|---|---|\n| 1 | 2 |", title="<t> & u").read_text()
    assert base64.b64encode(PNG).decode() in page and "a.png" not in page
    assert "<h1>Title</h1>" in page and "<td>2</td>" in page and "<title>&lt;t> &amp; u</title>" in page
    assert not list(tmp_path.glob(".*")), "the half-written page is left"


def test_a_missing_picture_leaves_the_old_page(tmp_path):
    write_page(tmp_path / "x.html", "old", title="")
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        write_page(tmp_path / "x.html", "![a](no.png)", title="")
    assert "old" in (tmp_path / "x.html").read_text()


def test_what_a_model_wrote_is_shown_and_not_obeyed(tmp_path):
    page = write_page(tmp_path / "x.html", f"{quoted(HOSTILE)}\n\n| a |\n|---|\n| {cell(HOSTILE)} |\n\n{cell(HOSTILE)}", title="").read_text()
    body = page.split("<body>")[1]
    assert body.count("&lt;script&gt;") == 3
    assert not re.search(r"<(script|img|a|h1|em|strong)\b", body) and "href=" not in body and "src=" not in body
    assert "default-src 'none'" in page


@pytest.mark.parametrize("text", ["", "`", "```", "a\n````\nb", "~~~", "    indented", "</pre>"])
def test_a_quotation_ends_where_it_ends(tmp_path, text):
    page = write_page(tmp_path / "x.html", f"{quoted(text)}\n\nafter", title="").read_text()
    assert page.count("<pre>") == 1 and "<p>after</p>" in page
