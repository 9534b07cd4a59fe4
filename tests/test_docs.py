"""What the documentation says is executed, and agrees with the rest of the project.

Every ```python block of the README, of docs/ and of docs/tutorials/ runs, in order, one namespace
for each file. Code that a page needs but does not show stands in an HTML comment that begins with
`setup`. Blocks of another project's code are fenced as ```py, and are not run. The `>>>` examples
of public docstrings run too.
"""

import doctest
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ewc
import ewc.fisher
import ewc.likelihoods
from tests.support.pages import blocks, run
from tests.support.versions import needs_sharding

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *TUTORIALS]
WITH_CODE = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]

# The table "hypnettorch's functions, and where each went": what each row names, there and here.
HYPNETTORCH = [
    (["task_id", "online", "gamma"], ["consolidate", "OnlineEWC", "decay"]),
    (["data", "n_max", "device"], ["batches", "max_samples", "device"]),
    (["params", "mnet", "hnet"], ["model", "parameters", "forward"]),
    (["custom_forward", "custom_nll", "pass_ids"], ["forward", "Custom", "rest"]),
    (["context_mod_forward"], ["context_mod_forward(mod_weights)"]),
    (["regression", "regression_lvar", "time_series"], ["Regression(variance=)", "TimeSeries"]),
    (["allowed_outputs", "target_manipulator"], ["allowed_outputs", "target_transform"]),
    (["empirical_fisher=False"], ['fisher_type="exact"', '"mc"']),
    (["proper_scaling", "prior_strength"], ['reduction="sum"', "prior_precision"]),
]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[needs_sharding] * (page.stem == "distributed"))
        for page in WITH_CODE
    ],
)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize(
    "name",
    [
        "README",
        "adding-a-rule",
        "faq",
        "from-avalanche",
        "from-hypnettorch",
        "from-other-code",
        "how-it-works",
        "likelihoods",
        "quickstart",
        "troubleshooting",
    ],
)
def test_pages_that_show_code_have_blocks_that_run(name: str) -> None:
    assert name in {page.stem for page in WITH_CODE}


@pytest.mark.parametrize(("there", "here"), HYPNETTORCH, ids=lambda names: names[0])
def test_the_page_for_hypnettorch_has_both_sides_of_every_row(
    there: list[str], here: list[str]
) -> None:
    text = (ROOT / "docs" / "from-hypnettorch.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    matching = [row for row in rows if all(f"`{name}`" in row[0] for name in there)]
    assert len(matching) == 1, f"{len(matching)} rows have {there} on their left"
    missing = [name for name in here if name not in matching[0][1]]
    assert not missing, f"not on the right of that row: {missing}"


def test_the_checks_run_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    second = 'pip install -e ".[test]" && python -m pytest'
    assert second in readme
    assert second in checks
    assert 'pip install -e ".[examples]" && python docs/examples/permuted_digits.py' in readme


def test_the_links_of_the_readme_work_on_a_package_index() -> None:
    """They are absolute, into this repository, and lead to files that are there."""
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert targets
    here = re.compile(
        r"https://(?:github\.com/ewc-developers/ewc/blob|raw\.githubusercontent\.com/ewc-developers/ewc)"
        r"/main/([^#]+)"
    )
    for target in targets:
        assert target.startswith("https://"), target
        match = here.match(target)
        assert match is None or (ROOT / match[1]).is_file(), target


def test_the_version_is_the_same_in_all_places() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    assert f"## [{ewc.__version__}]" in changelog
    assert f"\nversion: {ewc.__version__}\n" in citation
    assert f"version = {{{ewc.__version__}}}" in page


def test_the_page_on_citing_has_what_the_citation_file_has() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8").replace("\\&", "&")
    found = re.findall(r"^ *(?:- )?(?:doi|title|journal|year): (.+)$", citation, re.MULTILINE)
    values = [each.strip('"') for each in found]
    assert len(values) > 5
    assert [each for each in values if each not in page] == []


def test_every_error_and_warning_has_a_heading_in_troubleshooting() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = "\n".join(re.findall(r"^#+ (.+)$", page, re.MULTILINE))
    kinds = [
        name
        for name in ewc.__all__
        if isinstance(getattr(ewc, name), type) and issubclass(getattr(ewc, name), Exception)
    ]
    assert kinds
    assert [name for name in kinds if name not in headings] == []


def with_examples() -> list[object]:
    """The classes and functions of `ewc`, `ewc.fisher` and `ewc.likelihoods` with examples."""
    modules = (ewc, ewc.fisher, ewc.likelihoods)
    names = [getattr(module, name) for module in modules for name in module.__all__]
    public = {id(each): each for each in names if inspect.isclass(each) or inspect.isfunction(each)}
    finder = doctest.DocTestFinder()
    return [each for each in public.values() if any(test.examples for test in finder.find(each))]


@pytest.mark.parametrize("each", with_examples(), ids=lambda each: each.__name__)
def test_examples_in_docstrings_run(each: object) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 5)
    data = TensorDataset(torch.randn(20, 4), torch.randint(5, (20,)))
    names = {name: getattr(ewc, name) for name in ewc.__all__} | {
        "F": F,
        "model": model,
        "nn": nn,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "tasks": [DataLoader(data, batch_size=5)] * 2,
        "torch": torch,
    }
    for test in doctest.DocTestFinder(recurse=True).find(each, globs=names):
        report: list[str] = []
        doctest.DocTestRunner(verbose=False).run(test, out=report.append)
        assert not report, "".join(report)


@pytest.mark.parametrize(
    "name",
    [
        "EWC",
        "OnlineEWC",
        "Likelihood",
        "Pointwise",
        "Classification",
        "Bernoulli",
        "Regression",
        "TimeSeries",
        "Custom",
        "Summary",
    ],
)
def test_what_users_begin_with_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(ewc, name).__doc__ or "")


def test_the_reference_has_all_public_names() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = [f"ewc.{name}" for name in ewc.__all__ if name != "__version__"]
    names += [f"ewc.fisher.{name}" for name in ewc.fisher.__all__]
    names += ["ewc.likelihoods.Targets", "ewc.likelihoods.Fault"]
    names += ["ewc.plot.plot_fisher", "ewc.integrations.transformers.EWCMixin"]
    shown = set(re.findall(r"^   (ewc\.\S+)$", page, re.MULTILINE))
    assert [name for name in names if name not in shown] == []


def test_the_table_of_the_architecture_has_every_module() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    listed = []
    for row in re.findall(r"^\| (`ewc/.*?`) \|", page, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):  # the first with its folder, the rest without
            folder = name.rpartition("/")[0] if "/" in name else folder
            listed.append(f"{folder}/{name.rpartition('/')[2]}")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ewc").rglob("*.py")}
    folders = {name for name in modules if name.endswith("/__init__.py")} - {"ewc/__init__.py"}
    assert sorted(listed) == sorted(modules - folders)


def test_every_page_is_in_the_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    entries = re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL)
    listed = {line for block in entries for line in block.splitlines()}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= listed, pages - listed


def load_extension(name: str) -> ModuleType:
    """A module of docs/_extensions, which is no package."""
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "docs" / "_extensions" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page", [page for page in TUTORIALS if page.stem != "index"], ids=lambda page: page.stem
)
def test_the_notebook_of_a_tutorial_has_the_blocks_that_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    notebook = load_extension("notebooks").notebook(f"tutorials/{page.stem}", text)
    cells = notebook["cells"]
    code = [cell["source"] + "\n" for cell in cells if cell["cell_type"] == "code"]
    assert code == [code for _, code in blocks(text)]
    words = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    assert "```python" not in words
    assert "<!-- setup" not in words
    docs = "https://github.com/ewc-developers/ewc/blob/main/docs/"
    for target in re.findall(r"\]\(([^)#]+)", words):
        assert target.startswith("https://"), target
        assert not target.startswith(docs) or (ROOT / "docs" / target[len(docs) :]).is_file()
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_every_tutorial_is_in_the_contents_and_has_blocks_that_run() -> None:
    index = TUTORIALS[0].with_name("index.md")
    listed = index.read_text(encoding="utf-8").split("```{toctree}")[1].splitlines()
    tutorials = [page for page in TUTORIALS if page != index]
    assert [page.stem for page in tutorials if page.stem not in listed] == []
    assert [page.stem for page in tutorials if page not in WITH_CODE] == []
