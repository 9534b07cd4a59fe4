"""Texts that come with packages, as windows of characters.

Two parallel English Bibles (King James, 1611; Wycliffe, about 1390), and the source code of aeon.
The packages are read, and not imported: what they themselves need is not installed.
"""

from __future__ import annotations

import ast
from importlib import metadata

import torch
from _data import file_of
from torch import Tensor

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
OTHER = len(ALPHABET)
"""Every character that is not in the alphabet."""
START = OTHER + 1
"""What each window begins with, so that a model can write from nothing."""
SYMBOLS = START + 1
SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}


def bible(version: str) -> str:
    """The text of `pythonbible-<version>`, without the numbers of verses."""
    file = file_of(f"pythonbible-{version}", "/plain_text_readers_bible.py")
    literals = (getattr(one, "value", None) for one in ast.walk(ast.parse(file.read_text("utf-8"))))
    return max((one for one in literals if isinstance(one, str)), key=len)


def code() -> str:
    """The Python files of aeon, in the order of their paths."""
    file_of("aeon", "aeon/__init__.py")  # says how to install it
    files = metadata.files("aeon") or []
    chosen = sorted((file for file in files if file.suffix == ".py"), key=str)
    return "\n".join(file.read_text("utf-8") for file in chosen)


class Text:
    """A text in three parts.

    Args:
        text: The characters.
        longest: How many characters of each part are used, at most.
    """

    def __init__(self, text: str, longest: int = 1_000_000) -> None:
        table = {character: index for index, character in enumerate(ALPHABET)}
        self._parts = {}
        for split, (begin, end) in SPLITS.items():
            part = text[int(begin * len(text)) : int(end * len(text))][:longest]
            self._parts[split] = torch.tensor([table.get(one, OTHER) for one in part])

    def windows(self, split: str, number: int, length: int, generator: torch.Generator) -> Tensor:
        """Windows at random places, `START` before each: `[number, 1 + length]`."""
        part = self._parts[split]
        begin = torch.randint(len(part) - length, (number, 1), generator=generator)
        windows = part[begin + torch.arange(length)]
        return torch.cat([torch.full((number, 1), START), windows], 1)
