"""The code of a page of the documentation; `python pages.py PAGE` runs it."""

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^(?:```python|<!-- setup)\n(.*?)^(?:```|-->)$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """The executable blocks of a page: the line that each begins at, and its code."""
    return [(text[: m.start(1)].count("\n"), m[1]) for m in BLOCK.finditer(text)]


def run(page: Path) -> None:
    """Runs the blocks of a page in order, in one namespace."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page.read_text(encoding="utf-8")):
        # Blank lines in front, so that a traceback shows the page's own line numbers.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
