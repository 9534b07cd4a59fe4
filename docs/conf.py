"""Sphinx configuration: `python -m sphinx -W -b html docs docs/_build/html`."""

import sys
from pathlib import Path

import ewc

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "ewc"
author = "the ewc authors"
version = release = ewc.__version__
language = "en"

extensions = [
    "formulas",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "benchmarks", "examples"]
default_role = "code"

html_math_renderer = "formulas"
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
myst_html_meta = {
    "description": "Elastic Weight Consolidation (EWC) for PyTorch: train one network on a "
    "sequence of tasks without catastrophic forgetting.",
    "keywords": "continual learning, catastrophic forgetting, EWC, Fisher information, PyTorch",
}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Neither Python's prompts nor what is printed are copied.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"

html_theme = "furo"
html_title = f"ewc {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_favicon = "_static/icon.svg"
html_logo = "_static/icon.svg"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "source_repository": "https://github.com/ewc-developers/ewc/",
    "source_branch": "main",
    "source_directory": "docs/",
}
