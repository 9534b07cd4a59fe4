"""Sphinx configuration: `python -m sphinx -W -b html docs docs/_build/html`."""

import ewc

project = "ewc"
author = "the ewc authors"
release = ewc.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "benchmarks", "examples"]

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "ewc"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_copyright = False
