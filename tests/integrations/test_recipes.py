"""The recipes as a whole: none without its test, and none of their libraries in `import ewc`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.recipes import RECIPES

PAGES = sorted(page.stem for page in RECIPES.glob("*.md") if page.stem != "index")


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_its_test_and_is_in_the_index(page: str) -> None:
    test = Path(__file__).parent / f"test_{page.replace('-', '_')}.py"
    assert f'"{page}"' in test.read_text(encoding="utf-8")
    assert f"]({page}.md)" in (RECIPES / "index.md").read_text(encoding="utf-8")


def test_the_library_imports_none_of_them() -> None:
    code = (
        "import sys, ewc; "
        "unwanted = {'transformers', 'lightning', 'accelerate', 'peft'}; "
        "assert not unwanted & set(sys.modules), unwanted & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=RECIPES.parents[1])
