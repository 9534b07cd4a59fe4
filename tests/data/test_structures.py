from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from ewc.data.structures import children, describe, holds_tensors, rebuild
from tests.support.reading import Encoding, x

PACKED: PackedSequence = pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)])
Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (x(), "Tensor[4, 3] float32"),
        (torch.tensor(1), "Tensor[] int64"),
        ((x(), [1, "a"]), "(Tensor[4, 3] float32, [1, 'a'])"),
        ([x()], "[Tensor[4, 3] float32]"),
        (["a", "b"], "list of 2 str"),
        ((1, 2, 3), "tuple of 3 int"),
        ({"a": x(), "b": None}, "{'a': Tensor[4, 3] float32, 'b': None}"),
        (OrderedDict(a=1), "OrderedDict{'a': 1}"),
        (Encoding({"a": 1}, note=""), "Encoding{'a': 1}"),
        (SimpleNamespace(x=1), "SimpleNamespace"),
        ((PACKED, 1), "(PackedSequence, 1)"),
        (([], {}), "([], {})"),
    ],
    ids=str,
)
def test_describe(value: Any, expected: str) -> None:
    assert describe(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (x(), True),
        (PACKED, True),
        ([{"a": ("b", x())}], True),
        ([nn.Linear(2, 2), "b", {"c": [1]}], False),
        ([], False),
        (None, False),
    ],
    ids=str,
)
def test_holds_tensors(value: Any, expected: bool) -> None:
    assert holds_tensors(value) is expected


@pytest.mark.parametrize(
    "container",
    [[1, 2], (1, 2), Pair(1, 2), {"a": 1, "b": 2}, OrderedDict(b=1, a=2), Encoding({"a": 1}, "n")],
    ids=str,
)
def test_rebuild_is_the_inverse_of_children(container: Any) -> None:
    items = children(container)
    assert items is not None
    rebuilt = rebuild(container, items)
    assert rebuilt == container
    assert rebuilt is not container
    assert type(rebuilt) is type(container)
    other = rebuild(container, [item + 1 for item in items])
    assert children(other) == [item + 1 for item in items]
    assert children(container) == items


@pytest.mark.parametrize("value", ["text", 3, None, PACKED, {1, 2}], ids=str)
def test_other_values_have_no_children(value: Any) -> None:
    assert children(value) is None
