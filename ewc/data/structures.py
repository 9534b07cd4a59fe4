"""Nested structures of lists, tuples, mappings and tensors: walked, rebuilt and described.

`torch.utils._pytree` would drop what subclasses of dict add (a Hugging Face `BatchEncoding`), and
does not tell a list of one object per sample from a list of inputs.
"""

import copy
from collections import UserDict
from collections.abc import Iterator, Mapping
from numbers import Number
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def describe(value: Any) -> str:
    """The structure of a value in one line: types, and the shapes and types of tensors."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items())
        return f"{'' if type(value) is dict else type(value).__name__}{{{inside}}}"
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        kinds = {type(item).__name__ for item in value}
        if len(kinds) == 1 and not holds_tensors(value):
            return f"{type(value).__name__} of {len(value)} {kinds.pop()}"
        inside = ", ".join(describe(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return repr(value) if is_scalar(value) else type(value).__name__


def rebuild(container: Any, items: list[Any]) -> Any:
    """A container of the same kind with other items, in the same order."""
    if isinstance(container, Mapping):
        named = dict(zip(container, items, strict=True))
        if not isinstance(container, (dict, UserDict)):
            return named
        # A copy keeps what subclasses add, such as attribute access to a BatchEncoding's items.
        rebuilt = copy.copy(container)
        for key, item in named.items():
            rebuilt[key] = item
        return rebuilt
    if isinstance(container, list):
        return items
    make = getattr(container, "_make", tuple)  # a NamedTuple stays one
    return make(items)


def holds_tensors(value: Any) -> bool:
    """Whether a tensor lies anywhere in the value, so that it is no list of plain objects."""
    return any(isinstance(leaf, (Tensor, PackedSequence)) for leaf in _leaves_of(value))


def _leaves_of(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        for item in value:
            yield from _leaves_of(item)
    else:
        yield value


def is_scalar(value: Any) -> bool:
    """Whether all samples share the value as it is: a number, a string, bytes, or None."""
    return value is None or isinstance(value, (Number, str, bytes))
