from collections import OrderedDict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ewc.data.batch import Batch
from tests.support.reading import Encoding, read, x

Pair = namedtuple("Pair", ["x", "y"])


class TestSamples:
    @pytest.mark.parametrize(
        "raw",
        [
            (x(), torch.arange(4)),
            [x(), torch.arange(4)],
            (x(),),
            ((x(), x()), torch.arange(4)),
            ([{"c": x()}], torch.arange(4)),
            ({"a": x(), "b": [x(), {"c": x()}]}, torch.arange(4), torch.arange(4)),
            {"input_ids": x(), "labels": torch.arange(4)},
            OrderedDict(input_ids=x()),
            (x(), ["a", "b", "c", "d"], 3, "shared", None, torch.tensor(5.0)),
            (["a", "b", "c", "d"], torch.arange(4)),
            (x(), [object() for _ in range(4)], (1, 2, 3, 4), [], {}),
        ],
        ids=str,
    )
    def test_samples_are_counted_and_cut(self, raw: Any) -> None:
        batch = read(raw)
        assert batch.size == 4
        assert type(batch.raw) is type(raw)
        part = batch.take(1, 3)
        assert part.size == 2
        assert part.take(1, 2).size == 1
        for tensor, whole in zip(part.tensors, batch.tensors, strict=True):
            assert torch.equal(tensor, whole[1:3])

    def test_objects_are_cut_and_scalars_shared(self) -> None:
        parts = (x(), ["a", "b", "c", "d"], ("e", "f", "g", "h"), 3, None, torch.tensor(5.0))
        _, listed, tupled, *shared = read(parts).take(1, 3).raw
        assert (listed, tupled) == (["b", "c"], ("f", "g"))
        assert shared == [3, None, 5.0]
        assert read(parts).vectorisable
        assert not read((["a", "b"], [object(), object()])).vectorisable

    def test_a_batch_may_have_no_samples(self) -> None:
        batch = read((torch.zeros(0, 3), torch.zeros(0), []))
        assert batch.size == 0
        assert batch.raw[0].shape == (0, 3)

    def test_samples_lie_along_batch_dim_except_in_1d_tensors(self) -> None:
        ids = torch.arange(4)
        batch = read((torch.zeros(7, 4, 2), torch.zeros(7, 4), ids), batch_dim=1)
        assert batch.size == 4
        assert batch.dims == [1, 1, 0]
        inputs, targets, some = batch.take(2, 3).raw
        assert (inputs.shape, targets.shape, some) == ((7, 1, 2), (7, 1), ids[2:3])

    def test_raw_and_tensors_are_copies(self) -> None:
        data, shared = x(), torch.tensor(2.0)
        before, cut = data.clone(), read((data, {"shared": shared})).take(1, 2)
        for _ in range(2):
            part, rest = cut.raw
            assert torch.equal(part, before[1:2])
            assert rest["shared"] == 2
            part.zero_()
            rest["shared"].zero_()
            cut.tensors[0].zero_()
        assert torch.equal(data, before)
        assert shared == 2

    def test_pick(self) -> None:
        data = x()
        picked = read((data, data[:, 0])).pick([2, 0])
        assert picked.size == 2
        assert torch.equal(picked.raw[0], data[[2, 0]])
        assert torch.equal(picked.raw[1], data[[2, 0], 0])
        assert torch.equal(read((data,), batch_dim=1).pick([1]).raw[0], data[:, 1:2])
        assert read((data, list("abcd"), tuple("efgh"))).pick([2, 0]).raw[1:] == (
            ["c", "a"],
            ("g", "e"),
        )


@settings(max_examples=20, deadline=None)
@given(batch_dim=st.integers(0, 1), n=st.integers(1, 5), targets=st.booleans())
def test_of_one_rebuilds_the_batch_of_a_sample_inside_vmap(
    batch_dim: int, n: int, targets: bool
) -> None:
    shape = (3, n, 2) if batch_dim else (n, 3, 2)
    raw = {"x": (torch.randn(shape), 2.0), "ids": torch.arange(n), "t": torch.tensor(3.0)}
    if targets:
        raw["labels"] = torch.randn(shape)
    batch = read(raw, batch_dim)

    def model(*tensors: Tensor) -> Tensor:
        one = batch.of_one(tensors)
        assert one["ids"].shape == (1,)
        assert one["x"][0].shape[batch_dim] == 1
        assert one["x"][1] == 2.0
        total = one["x"][0].sum() * one["t"] + one["ids"].sum()
        return total + one["labels"].sum() if targets else total

    found = torch.func.vmap(model, in_dims=tuple(batch.dims))(*batch.tensors)
    alone = [batch.take(i, i + 1).tensors for i in range(n)]
    expected = [
        model(*(t.squeeze(d) for t, d in zip(one, batch.dims, strict=True))) for one in alone
    ]
    assert_close(found, torch.stack(expected))


class TestContainers:
    def test_named_tuples_are_rebuilt(self) -> None:
        batch = read(Pair(x(), Pair(torch.arange(4), 3)))
        assert batch.take(0, 1).raw.x.shape == (1, 3)
        assert batch.raw.y.y == 3

    def test_subclasses_of_mappings_keep_their_attributes(self) -> None:
        encoding = Encoding({"input_ids": x(), "labels": torch.arange(4)}, note="kept")
        raw = read(encoding).take(0, 2).raw
        assert raw.input_ids.shape == (2, 3)
        assert raw.note == "kept"
        assert encoding.input_ids.shape == (4, 3)

    def test_other_mappings_become_dicts(self) -> None:
        raw = read(MappingProxyType({"x": x()})).raw
        assert type(raw) is dict
        assert list(raw) == ["x"]

    def test_the_loaders_containers_are_not_changed(self) -> None:
        tensors, labels = [x(), x()], {"y": x(), "scale": 2.0}
        data = {"x": tensors, "labels": labels}
        before = {"x": [*tensors], "labels": {**labels}}
        batch = read(data)
        for raw in (batch.raw, batch.of_one([tensor[0] for tensor in batch.tensors])):
            raw["x"][0] = None
            raw["labels"]["y"] = None
            raw["labels"].pop("scale")
            raw.pop("x")
        assert data == before  # compares tensors by identity
        assert data["x"] is tensors
        assert data["labels"] is labels


class TestJoining:
    @pytest.mark.parametrize(
        "make",
        [
            lambda n: (x(n), torch.arange(n)),
            lambda n: [x(n).double(), None, 2, "same"],
            lambda n: {"a": x(n), "labels": [torch.arange(n), (x(n), 1.5)]},
            lambda n: Pair(x(n), torch.arange(n)),
            lambda n: Encoding({"a": x(n)}, note="same"),
            lambda n: (x(n).requires_grad_(), torch.arange(n)),
            lambda n: (x(n), [f"key {i}" for i in range(n)], tuple(range(n))),
        ],
    )
    def test_batches_of_equal_structure(self, make: Any) -> None:
        parts = [read(make(n)) for n in (3, 1, 2)]
        assert all(parts[0].joins(part) for part in parts)
        joined = Batch.joined(parts)
        assert joined.size == 6
        for start, stop, part in [(0, 3, parts[0]), (3, 4, parts[1]), (4, 6, parts[2])]:
            found, expected = joined.take(start, stop).raw, part.raw
            assert type(found) is type(expected)
            for one, other in zip(
                torch.utils._pytree.tree_leaves(dict(found) if "a" in found else found),
                torch.utils._pytree.tree_leaves(dict(expected) if "a" in expected else expected),
                strict=True,
            ):
                if isinstance(one, Tensor):
                    assert_close(one, other)
                    assert one.requires_grad == other.requires_grad
                else:
                    assert one == other

    def test_along_another_dimension(self) -> None:
        one, other = torch.randn(5, 2, 3), torch.randn(5, 4, 3)
        parts = [read((each, torch.zeros(each.shape[1])), batch_dim=1) for each in (one, other)]
        assert parts[0].joins(parts[1])
        assert_close(Batch.joined(parts).raw[0], torch.cat([one, other], 1))

    def test_tensors_with_their_samples_along_other_dimensions_are_not_joined(self) -> None:
        one, other = read((torch.zeros(4, 3),), batch_dim=1), read((torch.zeros(4),), batch_dim=1)
        assert not one.joins(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ((x(), x()), (x(), x().double())),
            ((x(), x()), (x(), torch.zeros(4, 2))),
            ((x(), x()), (x(), x().requires_grad_())),
            ((x(), 1), (x(), 2)),
            ((x(), 1), (x(), 1.0)),
            ((x(), None), (x(), "")),
            ((x(), float("nan")), (x(), float("nan"))),
            ((x(), torch.tensor(1)), (x(), torch.tensor(2))),
            ((x(), x()), [x(), x()]),
            ((x(), x()), (x(), x(), x())),
            ({"a": x(), "labels": x()}, {"labels": x(), "a": x()}),
            (Encoding({"a": x()}, note="one"), Encoding({"a": x()}, note="other")),
            ((x(), ["a", "b", "c", "d"]), (x(), ("a", "b", "c", "d"))),
        ],
    )
    def test_batches_that_differ_are_not_joined(self, one: Any, other: Any) -> None:
        parts = [read(each, targets_required=False) for each in (one, other)]
        assert not parts[0].joins(parts[1])
