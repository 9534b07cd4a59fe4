"""Placeholders of lists of objects: whatever reads one says so."""

import copy
import json
import operator
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ewc.data.objects import ObjectsRead, unread
from ewc.data.structures import children, describe, holds_tensors

READERS: dict[str, Callable[[Any], Any]] = {
    "iteration": list,
    "unpacking": lambda items: (lambda one: one)(*items),
    "an index": lambda items: items[0],
    "a slice": lambda items: items[:],
    "in": lambda items: "a" in items,
    "==": lambda items: items == ["a"],
    "== from the left": lambda items: operator.eq(["a"], items),
    "!=": lambda items: items != ["a"],
    "<": lambda items: items < items,
    "+": lambda items: items + type(items)(),
    "+ from the left": lambda items: (["a"] if isinstance(items, list) else ("a",)) + items,
    "*": lambda items: items * 2,
    "* from the left": lambda items: 2 * items,
    "repr": repr,
    "str": str,
    "format": lambda items: f"{items}",
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "json": json.dumps,
    "numpy": np.array,
    "join": lambda items: "".join(items),
    "sorted": sorted,
    "reversed": lambda items: list(reversed(items)),
    "zip": lambda items: list(zip(items, [1], strict=True)),
    "max": max,
    "extend": lambda items: [].extend(items),
    "index": lambda items: items.index("a"),
    "count": lambda items: items.count("a"),
    "set": set,
}


@pytest.mark.parametrize("objects", [["a"], ("a",)], ids=["list", "tuple"])
class TestPlaceholders:
    @pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
    def test_say_that_they_are_read(self, objects: Sequence[str], read: Any) -> None:
        with pytest.raises(ObjectsRead, match="lists of objects"):
            read(unread(objects))

    @pytest.mark.parametrize("make", [torch.tensor, torch.stack, torch.cat])
    def test_are_no_tensors(self, objects: Sequence[str], make: Any) -> None:
        with pytest.raises((ValueError, RuntimeError)):
            make(unread(objects))

    def test_are_of_the_type_and_length_of_one_object(self, objects: Sequence[str]) -> None:
        found = unread(objects)
        assert isinstance(found, type(objects))
        assert len(found) == 1
        assert found

    def test_have_nothing_to_traverse(self, objects: Sequence[str]) -> None:
        found = unread(objects)
        assert children(found) is None
        assert not holds_tensors([found])
        assert describe(found) == type(objects).__name__


def test_a_list_can_not_be_changed() -> None:
    for change in ("append", "remove", "__delitem__", "insert", "pop", "clear", "sort"):
        with pytest.raises(ObjectsRead):
            getattr(unread(["a"]), change)()


def test_a_tuple_has_no_hash() -> None:
    with pytest.raises(ObjectsRead):
        hash(unread(("a",)))
