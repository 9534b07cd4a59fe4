"""What the documentation says is executed, and agrees with the rest of the project.

Every ```python block of the README and of docs/ runs, in order, one namespace for each file. Code
that a page needs but does not show stands in an HTML comment that begins with `setup`. Blocks of
another project's code are fenced as ```py, and are not run.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:```python|<!-- setup)\n(.*?)^(?:```|-->)$", re.MULTILINE | re.DOTALL)

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


def blocks(text: str) -> list[tuple[int, str]]:
    """The executable blocks of a page: the line that each begins at, and its code."""
    return [(text[: m.start(1)].count("\n"), m[1]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page.read_text(encoding="utf-8")):
        # Blank lines in front, so that a traceback shows the page's own line numbers.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", ["README", "quickstart", "likelihoods", "from-hypnettorch"])
def test_pages_that_show_code_have_blocks_that_run(name: str) -> None:
    page = next(page for page in PAGES if page.stem == name)
    assert blocks(page.read_text(encoding="utf-8"))


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
