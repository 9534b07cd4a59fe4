"""Lists of one object per sample inside `vmap`, where a sample has only its tensors.

Keys, file names or prompts often accompany the tensors of a batch, and nothing reads them. So the
model gets a placeholder of the same type in their place: a list or tuple of one object that raises
`ObjectsRead` as soon as anything reads it.
"""

from collections.abc import Callable, Sequence
from typing import Any


class ObjectsRead(Exception):  # noqa: N818 - a condition, not an error: as StopIteration
    """The model or the likelihood has read a list of objects inside `vmap`."""

    def __init__(self) -> None:
        super().__init__(
            "the model, forward or likelihood reads lists of objects, which vmap cannot split as "
            "it does tensors (padded, with their lengths or a mask)"
        )


class Unread:
    """The placeholder of a list or tuple of one object."""


def unread(objects: Sequence[Any]) -> Sequence[Any]:
    """The placeholder of a list or tuple of objects; its length is 1."""
    return _UnreadTuple() if isinstance(objects, tuple) else _UnreadList()


def _raise(*_: Any, **__: Any) -> Any:
    raise ObjectsRead


def _readers(base: type) -> dict[str, Callable[..., Any]]:
    """What a placeholder has in place of the methods of `base` that read its items."""
    kept = {*dir(object), "__len__", "__class_getitem__"} - {"__eq__", "__ne__", "__hash__"}
    compared = {"__lt__", "__le__", "__gt__", "__ge__", "__repr__", "__str__", "__format__"}
    copied = {"__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__", "__getstate__"}
    names = {*dir(base)} - kept | compared | copied | {"__radd__", "__eq__", "__ne__"}
    return dict.fromkeys(names, _raise)


def _length(_: Any) -> int:
    return 1


_UnreadList: type[list[Any]] = type(
    "list", (Unread, list), {**_readers(list), "__len__": _length, "__hash__": None}
)
_UnreadTuple: type[tuple[Any, ...]] = type(
    "tuple", (Unread, tuple), {**_readers(tuple), "__len__": _length, "__hash__": _raise}
)
