"""Checks of plain numbers, one message style for all of them.

`bool` is an `int` in Python and `nan` compares false with everything, so the obvious comparisons
let both through: a strength of `True` or `nan` must not reach a training run.
"""

import math
from numbers import Integral, Real
from typing import TypeVar

_Word = TypeVar("_Word", bound=str)


def number(what: str, value: object, *, low: float = 0.0, high: float = math.inf) -> float:
    """`value` as a float, if it is a finite real number in `[low, high]`.

    Raises:
        TypeError: `value` is not a plain real number.
        ValueError: it is not finite, or out of range.
    """
    allowed = f"a finite number >= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be {allowed}; found {value!r} ({type(value).__name__}).")
    found = as_float(value)
    if not math.isfinite(found) or not low <= found <= high:
        raise ValueError(f"{what} must be {allowed}; found {value!r}.")
    return found


def as_float(value: Real) -> float:
    """The nearest float; infinite for an integer that is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def positive_int(what: str, value: object) -> int:
    """`value` as an int, if it is one and at least 1.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: it is less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{what} must be a positive integer; found {value!r} ({type(value).__name__})."
        )
    if value < 1:
        raise ValueError(f"{what} must be a positive integer; found {value!r}.")
    return int(value)


def choice(what: str, value: _Word, allowed: tuple[_Word, ...]) -> _Word:
    """`value`, if it is one of the `allowed` words.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}; found {value!r}.")
    return value
