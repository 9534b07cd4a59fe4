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
    "examples",
    "formulas",
    "notebooks",
    "reference",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "benchmarks", "examples"]
templates_path = ["_templates"]
default_role = "code"
nitpicky = True  # a type without a target is a warning
nitpick_ignore = [
    ("py:class", "ewc.fisher.rules.registry.Handler"),  # a type variable
    # Of `ewc.fisher.collect`, whose defaults serve everyone else.
    ("py:class", "ewc.fisher.verified.LastVerification"),
    ("py:class", "ewc.model.randomness.Randomness"),
    ("py:class", "ewc.processes.ranks.Ranks"),
]

html_math_renderer = "formulas"
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
myst_html_meta = {
    "description": "Elastic Weight Consolidation (EWC) for PyTorch: train one network on a "
    "sequence of tasks without catastrophic forgetting.",
    "keywords": "continual learning, catastrophic forgetting, EWC, Fisher information, PyTorch",
}

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
autosummary_context = {
    # All members of a class have entries of their own, except in these: those of the base class are
    # not repeated, nor are the fields of named tuples and what only the library calls.
    "members_of": {
        "ewc.Bernoulli": None,
        "ewc.Classification": None,
        "ewc.Curvature": "mean",
        "ewc.Custom": None,
        "ewc.Pointwise": "position_nll, position_sample, position_terms, head, positions, "
        "read_targets",
        "ewc.Regression": None,
        "ewc.TimeSeries": None,
        "ewc.fisher.Dense": None,
        "ewc.fisher.Gradient": "per_sample, add_squares",
        "ewc.fisher.Outer": None,
        "ewc.fisher.Rows": None,
        "ewc.fisher.Sum": None,
        "ewc.likelihoods.Fault": None,
        "ewc.likelihoods.Targets": None,
    },
    # Their base class is a public name, too.
    "with_bases": {
        "ewc.Bernoulli",
        "ewc.Classification",
        "ewc.Custom",
        "ewc.OnlineEWC",
        "ewc.Pointwise",
        "ewc.Regression",
        "ewc.TimeSeries",
        "ewc.fisher.Dense",
        "ewc.fisher.Outer",
        "ewc.fisher.Rows",
        "ewc.fisher.Sum",
    },
}
# Written by hand, so that a build needs no network: what the reference links to, and no more.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", str(HERE / "inventories" / "python.txt")),
    "matplotlib": (
        "https://matplotlib.org/stable",
        str(HERE / "inventories" / "matplotlib.txt"),
    ),
    "torch": ("https://docs.pytorch.org/docs/stable", str(HERE / "inventories" / "torch.txt")),
}
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
