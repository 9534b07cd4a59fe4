"""The directive `example-files`: a table of the scripts in a folder, to be opened or downloaded."""

import ast
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

WEB = "https://github.com/ewc-developers/ewc/blob/main/docs"


class ExampleFiles(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        folder = self.arguments[0]
        scripts = sorted((Path(self.env.srcdir) / folder).glob("*.py"))
        for script in scripts:
            self.env.note_dependency(str(script))
        table, group, body = nodes.table(), nodes.tgroup(cols=3), nodes.tbody()
        group += [nodes.colspec(colwidth=width) for width in (25, 65, 10)]
        head = nodes.thead("", self.row(*(nodes.Text(t) for t in ("download", "what", "open"))))
        body += [self.row(*self.cells(folder, script)) for script in scripts]
        group += [head, body]
        table += group
        return [table]

    def cells(self, folder: str, script: Path) -> tuple[nodes.Node, nodes.Node, nodes.Node]:
        documentation = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        name = nodes.literal(text=script.name)
        download = download_reference("", "", name, reftarget=f"/{folder}/{script.name}")
        download["refdoc"] = self.env.docname
        source = nodes.reference("", "source", refuri=f"{WEB}/{folder}/{script.name}")
        return download, nodes.Text(documentation.partition("\n")[0].replace("`", "")), source

    def row(self, *cells: nodes.Node) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", each)) for each in cells))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("example-files", ExampleFiles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
