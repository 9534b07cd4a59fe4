"""The arguments of likelihoods, validated once, when a likelihood is built."""

import math
import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from ewc._checks import as_float

_Function = TypeVar("_Function", bound=Callable[..., Any])


def output_indices(allowed: Iterable[int] | None) -> tuple[int, ...] | None:
    """Validate `allowed_outputs`: integers >= 0, at least one, each once.

    Raises:
        TypeError: They are not integers.
        ValueError: There are none, or some are negative or repeated.
    """
    if allowed is None:
        return None
    rule = "allowed_outputs must be the indices of a head's outputs: integers >= 0, each once"
    try:
        indices = tuple(_index(value) for value in allowed)
    except TypeError as error:
        raise TypeError(f"{rule}; found {allowed!r}. Mend: a list such as [0, 1].") from error
    if not indices:
        raise ValueError(f"{rule}; found none. Mend: None stands for all outputs.")
    negative = [index for index in indices if index < 0]
    if negative:
        raise ValueError(f"{rule}; found {abridged(negative)}. Mend: count from the first output.")
    repeated = sorted({index for index in indices if indices.count(index) > 1})
    if repeated:
        raise ValueError(f"{rule}; found {abridged(repeated)} more than once. Mend: drop copies.")
    return indices


def positive(name: str, value: Any) -> float | Tensor:
    """Validate a finite number or tensor > 0.

    Returns:
        A float, or a floating-point copy of the tensor on the CPU.

    Raises:
        TypeError: It is neither a real number nor a tensor of them.
        ValueError: It is not finite, or not > 0.
    """
    rule = f"{name} must be finite and > 0, a number or a tensor"
    if isinstance(value, Tensor) and value.dtype != torch.bool and not value.is_complex():
        copied = value.detach().to("cpu", copy=True)
        if not bool((copied.isfinite() & (copied > 0)).all()):
            raise ValueError(f"{rule}; found {copied}.")
        return copied if copied.is_floating_point() else copied.to(torch.get_default_dtype())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{rule}; found {value!r}.")
    number = as_float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{rule}; found {value!r}.")
    return number


def integer(name: str, value: Any) -> int:
    """Validate an integer.

    Raises:
        TypeError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; found {value!r}.")
    return value


def function(name: str, value: _Function) -> _Function:
    """Validate a function.

    Raises:
        TypeError: It cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function; found {value!r}.")
    return value


def abridged(values: Iterable[int]) -> str:
    """The first of some numbers, for a message."""
    listed = list(values)
    shown = ", ".join(str(value) for value in listed[:5])
    return shown if len(listed) <= 5 else f"{shown}, ... ({len(listed)} in all)"


def _index(value: Any) -> int:
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool):
        raise TypeError("a bool is no index")
    return operator.index(value)
