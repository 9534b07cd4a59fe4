"""The reference says public names, and how users call them, wherever something is defined."""

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import ewc
import ewc.fisher
import ewc.likelihoods
from ewc._summary import ROWS

# As docstrings name them, and as annotations do. The later ones win: it is `ewc.Classification`.
PUBLIC = {name: f"ewc.{name}" for name in ewc.__all__} | {
    f"{each.__module__}.{each.__qualname__}": f"{module.__name__}.{name}"
    for module in (ewc.fisher, ewc.likelihoods, ewc)
    for name, each in vars(module).items()
    if name in module.__all__ and isinstance(each, type)
}
ELSEWHERE = {
    "Figure": "matplotlib.figure.Figure",
    "ProcessGroup": "torch.distributed.ProcessGroup",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.module.Module": "torch.nn.Module",
}
# Made by the library alone: how they are called says nothing to a reader.
RESULTS = {"ewc.Curvature", "ewc.Summary", "ewc.fisher.Operation", "ewc.fisher.Squares"}


def use_public_names(app: Sphinx, doctree: nodes.document) -> None:
    names = PUBLIC | ELSEWHERE
    for link in doctree.findall(pending_xref):
        target = link["reftarget"]
        if link["refdomain"] == "py" and target in names:
            link["reftarget"] = names[target]
            if target in PUBLIC and link.astext() == target:
                link.children = [nodes.inline(text=PUBLIC[target].removeprefix("ewc."))]


def plain_signature(
    app: Sphinx,
    what: str,
    name: str,
    each: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    if name in RESULTS:
        return "", None
    if signature is None:
        return None
    return signature.replace("= ROWS", f"= {ROWS}"), returns


def describe_option(
    app: Sphinx, what: str, name: str, each: object, options: object, lines: list[str]
) -> None:
    """Add the text below the definition of a `Literal` type, which it does not carry itself."""
    if what == "data":
        texts = ModuleAnalyzer.for_module("ewc._options").find_attr_docs()
        lines[:0] = [*texts["", name.rpartition(".")[2]], ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.napoleon")
    app.connect("doctree-read", use_public_names)
    app.connect("autodoc-process-docstring", describe_option, priority=600)  # after napoleon
    app.connect("autodoc-process-signature", plain_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
