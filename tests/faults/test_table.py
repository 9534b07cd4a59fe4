"""The page *Guarantees and edge cases* and the tests have the same rows."""

import ast
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "what-happens-when.md"


def rows_of_the_page():
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^\| (\d+[a-z]?) \| (.+) \| (.+) \|$", text, re.MULTILINE)


def rows_of_the_tests():
    found = {}
    folder = Path(__file__).parent
    for path in (*folder.glob("test_*.py"), *folder.parent.glob("distributed/test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_row_"):
                number = re.match(r"test_row_(\d\d[a-z]?)_", node.name)
                assert number is not None, f"{path.name}: {node.name} names no row"
                found.setdefault(number[1].lstrip("0"), []).append(node.name)
    return found


def test_every_row_has_a_test_and_every_test_a_row():
    page = [number for number, *_ in rows_of_the_page()]
    assert len(set(page)) == len(page)
    assert set(page) == set(rows_of_the_tests())


def test_rows_are_in_order():
    page = [number for number, *_ in rows_of_the_page()]
    assert {str(number) for number in range(1, 48)} <= set(page)
    assert page == sorted(page, key=lambda row: (int(re.match(r"\d+", row)[0]), row))
