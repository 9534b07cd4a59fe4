"""Formulas as pictures (SVG), drawn at build time: pages read without a network, script or font."""

from xml.etree import ElementTree

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

SIZE = 17  # pixels; the font's letters are smaller than those of the text beside it
REM = 16  # pixels

ziamath.config.precision = 2
ziamath.config.svg2 = False  # no identifiers, which would be the same in every formula of a page
ziamath.config.math.color = "currentColor"


def draw(source: str, *, inline: bool) -> str:
    """A formula of LaTeX as SVG, which stands on the line of the text around it."""
    picture = ziamath.Latex(source, size=SIZE, inline=inline).svgxml()
    _, top, width, height = map(float, picture.attrib["viewBox"].split())
    picture.set("width", f"{width / REM:.3f}rem")
    picture.set("height", f"{height / REM:.3f}rem")
    picture.set("style", f"vertical-align: {-(top + height) / REM:.3f}rem")
    picture.set("role", "img")
    picture.set("aria-label", " ".join(source.split()))
    return ElementTree.tostring(picture, encoding="unicode")


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(draw(node.astext(), inline=True))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{draw(node.astext(), inline=False)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("formulas", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
