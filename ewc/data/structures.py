"""Nested structures of lists, tuples, mappings and tensors: traversed, rebuilt and described.

`torch.utils._pytree` is not used: it loses what subclasses of dict add (a Hugging Face
`BatchEncoding`), and treats a list of one object per sample like a list of inputs.
"""

import copy
from collections import UserDict
from collections.abc import Mapping
from numbers import Number
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ewc.data.objects import Unread


def describe(value: Any) -> str:
    """The structure of a value in one line: types, and the shape and dtype of each tensor."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    items = children(value)
    if items is None:
        return repr(value) if is_scalar(value) else type(value).__name__
    if isinstance(value, Mapping):
        inside = ", ".join(
            f"{key!r}: {describe(item)}" for key, item in zip(value, items, strict=True)
        )
        return f"{'' if type(value) is dict else type(value).__name__}{{{inside}}}"
    kinds = {type(item).__name__ for item in items}
    if len(kinds) == 1 and not holds_tensors(value):
        return f"{type(value).__name__} of {len(items)} {kinds.pop()}"
    inside = ", ".join(map(describe, items))
    return f"[{inside}]" if isinstance(value, list) else f"({inside})"


def children(value: Any) -> list[Any] | None:
    """The items of a list, a tuple or a mapping (its values); None if `value` is none of these.

    A `PackedSequence`, which is a tuple in Python, counts as one object, and so does the
    placeholder of a list of objects.
    """
    if isinstance(value, (PackedSequence, Unread)):
        return None
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    return None


def rebuild(container: Any, items: list[Any]) -> Any:
    """A container of the same type as `container`, with `items` in place of its children."""
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
    make = getattr(container, "_make", tuple)  # the constructor of a NamedTuple
    return make(items)


def holds_tensors(value: Any) -> bool:
    """Whether `value` is a tensor, or has one anywhere inside; if not, it is a plain object."""
    items = children(value)
    if items is None:
        return isinstance(value, (Tensor, PackedSequence))
    return any(map(holds_tensors, items))


def is_scalar(value: Any) -> bool:
    """Whether `value` is a number, a string, bytes, or None: all samples share it."""
    return value is None or isinstance(value, (Number, str, bytes))
