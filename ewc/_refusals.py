"""Errors that say what a model cannot do, told apart from faults that come once."""

import re
import textwrap
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def unless_refused(run: Callable[[], T]) -> T | None:
    """What `run` returns; None if it raises the same error twice.

    Args:
        run: Runs a model or a likelihood in a way that it need not support.

    Raises:
        Exception: One that is not raised again: a fault of the user's code.
    """
    try:
        return run()
    except Exception as error:
        first = error
    try:
        run()
    except Exception as again:
        if pattern(described(again)) == pattern(described(first)):
            return None
    raise first


def described(error: Exception) -> str:
    """An error in one line."""
    text = textwrap.shorten(str(error), 200, placeholder=" ...")
    return f"vmap cannot do it ({type(error).__name__}: {text})"


def pattern(text: str) -> str:
    """A text without numbers: addresses and versions differ from one run to the next."""
    return re.sub("0x[0-9a-f]+|[0-9]+", "#", text)
