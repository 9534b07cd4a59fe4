"""Each tutorial as a notebook: written at build time from the same page, and linked from it.

A block of Python becomes a code cell, also one that the page does not show (`<!-- setup`); all else
becomes text. Output that a page shows stays text, so that a reader can compare.
"""

import json
import posixpath
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = "notebooks"
WEB = "https://github.com/ewc-developers/ewc/blob/main/docs/"
INSTALL = 'pip install "ewc[examples] @ git+https://github.com/ewc-developers/ewc"'

_CODE = re.compile(r"^(```python|<!-- setup)\n(.*?)\n(?:```|-->)$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")


def notebook(docname: str, text: str) -> dict[str, Any]:
    """A page as a notebook, in nbformat 4.5.

    Args:
        docname: The page's path below docs/, without the suffix.
        text: The page.
    """
    cells: list[dict[str, Any]] = []
    end = 0
    for match in _CODE.finditer(text):
        cells.append(_text(_with_addresses(docname, text[end : match.start()])))
        cells.append(_code(match[2], hidden=match[1] != "```python"))
        end = match.end()
    cells.append(_text(_with_addresses(docname, text[end:])))
    cells = [cell for cell in cells if cell["source"]]
    cells.insert(
        1, _text(f"Install the packages of this notebook first:\n\n```bash\n{INSTALL}\n```")
    )
    return {
        "cells": [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _with_addresses(docname: str, text: str) -> str:
    """The text of a page, its relative links as addresses on the web."""
    folder = posixpath.dirname(docname)

    def address(match: re.Match[str]) -> str:
        return f"]({WEB}{posixpath.normpath(posixpath.join(folder, match[1]))})"

    return _LINK.sub(address, text)


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source.strip()}


def _code(source: str, *, hidden: bool) -> dict[str, Any]:
    metadata = {"jupyter": {"source_hidden": True}} if hidden else {}
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": metadata,
        "outputs": [],
        "source": source,
    }


def is_tutorial(docname: str) -> bool:
    return docname.startswith("tutorials/") and docname != "tutorials/index"


def add_link(app: "Sphinx", docname: str, source: list[str]) -> None:
    """Put the link below the title of a tutorial."""
    if is_tutorial(docname):
        title, rest = source[0].split("\n", 1)
        address = f"../{FOLDER}/{posixpath.basename(docname)}.ipynb"
        link = f'<p class="notebook"><a href="{address}" download>Download as a notebook</a></p>'
        source[0] = f"{title}\n\n{link}\n{rest}"


def write(app: "Sphinx", exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    folder = app.outdir / FOLDER
    folder.mkdir(exist_ok=True)
    for docname in filter(is_tutorial, app.env.found_docs):
        text = app.env.doc2path(docname).read_text(encoding="utf-8")
        path = folder / f"{posixpath.basename(docname)}.ipynb"
        path.write_text(json.dumps(notebook(docname, text), indent=1), encoding="utf-8")


def setup(app: "Sphinx") -> dict[str, bool]:
    app.connect("source-read", add_link)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
