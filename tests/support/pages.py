"""The code of a page of the documentation."""

import re

BLOCK = re.compile(r"^(?:```python|<!-- setup)\n(.*?)^(?:```|-->)$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """The executable blocks of a page: the line that each begins at, and its code."""
    return [(text[: m.start(1)].count("\n"), m[1]) for m in BLOCK.finditer(text)]
