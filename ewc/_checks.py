"""Checks of arguments, with one style of message: `X must be Y; found Z`.

In Python `bool` is an `int`, and every comparison with `nan` is false, so plain comparisons accept
both: a strength of `True` or `nan` would reach a training run.
"""

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import nn

_Word = TypeVar("_Word", bound=str)
_Function = TypeVar("_Function", bound=Callable[..., Any])

MOST = 10
"""How many names, or problems of one kind, a message shows; it counts the others."""


def listed(parts: Iterable[str], separator: str = ", ", most: int = MOST) -> str:
    """The first `most` of some texts and, if there are more, how many there are in all.

    Example:
        >>> listed(["a", "b", "c", "d"], most=2)
        'a, b, ... (4 in all)'
    """
    texts = list(parts)
    shown = separator.join(texts[:most])
    return shown if len(texts) <= most else f"{shown}{separator}... ({len(texts)} in all)"


def listed_names(names: Iterable[object]) -> str:
    """The first few of some names, quoted."""
    return listed(map(repr, names))


def number(
    name: str, value: object, *, low: float = 0.0, high: float = math.inf, other: str = ""
) -> float:
    """`value` as a float, if it is a finite real number in `[low, high]`.

    Args:
        name: What it is the value of.
        value: The value.
        low: The least number.
        high: The largest one.
        other: What else the caller allows, for the message.

    Raises:
        TypeError: `value` is not a plain real number.
        ValueError: `value` is not finite, or out of range.
    """
    rule = f"a finite number >= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
    rule = f"{rule}, or {other}" if other else rule
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {rule}; found {value!r} ({type(value).__name__}).")
    found = as_float(value)
    if not math.isfinite(found) or not low <= found <= high:
        raise ValueError(f"{name} must be {rule}; found {value!r}.")
    return found


def positive(name: str, value: object) -> float:
    """`value` as a float, if it is a finite real number greater than 0.

    Raises:
        TypeError: `value` is not a plain real number.
        ValueError: `value` is not finite, or not greater than 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a finite number > 0; found {value!r} ({type(value).__name__})."
        )
    found = as_float(value)
    if not math.isfinite(found) or found <= 0:
        raise ValueError(f"{name} must be a finite number > 0; found {value!r}.")
    return found


def as_float(value: Real | int) -> float:
    """The nearest float; infinity for an integer that is too large for a float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def positive_int(name: str, value: object) -> int:
    """`value` as an int, if it is an integer and at least 1.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name} must be a positive integer; found {value!r} ({type(value).__name__})."
        )
    if value < 1:
        raise ValueError(f"{name} must be a positive integer; found {value!r}.")
    return int(value)


def choice(name: str, value: object, allowed: tuple[_Word, ...]) -> _Word:
    """`value`, if it is one of the `allowed` strings.

    Raises:
        ValueError: `value` is not one of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; found {value!r}.")
    return allowed[allowed.index(value)]


def check_initialised(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse lazy parameters: the next forward pass would initialise them, and change the model.

    Raises:
        ValueError: Parameters are lazy; the message lists them.
    """
    lazy = [name for name, parameter in parameters if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"Parameters must be initialised; found lazy ones: {listed_names(lazy)}. "
            "Fix: run one forward pass first."
        )


def check_materialised(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse parameters that have no values.

    Raises:
        ValueError: Parameters are lazy, or on the meta device; the message lists them.
    """
    named = list(parameters)
    check_initialised(named)
    meta = [name for name, parameter in named if parameter.is_meta]
    if meta:
        raise ValueError(
            "Parameters must have values; found some on the meta device: "
            f"{listed_names(meta)}. Fix: materialise the model first, for instance with "
            "model.to_empty(device=...) and load_state_dict."
        )


def integer(name: str, value: object) -> int:
    """`value`, if it is an int.

    Raises:
        TypeError: `value` is not an int.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; found {value!r}.")
    return value


def function(name: str, value: _Function) -> _Function:
    """`value`, if it can be called.

    Raises:
        TypeError: `value` cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function; found {value!r}.")
    return value
