from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

from ewc.data.batch import Batch
from ewc.data.calling import apply
from ewc.errors import InvalidBatch

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["x", "y"])


class Encoding(UserDict[str, Any]):
    """A mapping with attribute access, as Hugging Face's BatchEncoding."""

    def __init__(self, data: dict[str, Any], note: str) -> None:
        super().__init__(data)
        self.note = note

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


def read(raw: Any, batch_dim: int = 0, targets_required: bool = True) -> Batch:
    return Batch.read(raw, batch_dim=batch_dim, device=CPU, targets_required=targets_required)


def x(n: int = 4) -> Tensor:
    return torch.arange(3.0 * n).reshape(n, 3)


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
    def test_are_counted_and_cut(self, raw: Any) -> None:
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
        assert not read(parts).vectorisable
        assert read((x(), 3, "shared", None, torch.tensor(5.0))).vectorisable

    def test_may_be_none_at_all(self) -> None:
        batch = read((torch.zeros(0, 3), torch.zeros(0), []))
        assert batch.size == 0
        assert batch.raw[0].shape == (0, 3)

    def test_lie_along_the_batch_dimension_but_for_one_dimension(self) -> None:
        ids = torch.arange(4)
        batch = read((torch.zeros(7, 4, 2), torch.zeros(7, 4), ids), batch_dim=1)
        assert batch.size == 4
        assert batch.dims == [1, 1, 0]
        inputs, targets, some = batch.take(2, 3).raw
        assert (inputs.shape, targets.shape, some) == ((7, 1, 2), (7, 1), ids[2:3])

    def test_what_is_handed_out_is_copied_each_time(self) -> None:
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

    def test_samples_picked(self) -> None:
        data = x()
        picked = read((data, data[:, 0])).pick([2, 0])
        assert picked.size == 2
        assert torch.equal(picked.raw[0], data[[2, 0]])
        assert torch.equal(picked.raw[1], data[[2, 0], 0])
        assert torch.equal(read((data,), batch_dim=1).pick([1]).raw[0], data[:, 1:2])


@settings(max_examples=20, deadline=None)
@given(batch_dim=st.integers(0, 1), n=st.integers(1, 5), targets=st.booleans())
def test_of_one_puts_a_vmapped_sample_back_together(batch_dim: int, n: int, targets: bool) -> None:
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
    def test_named_tuples_stay(self) -> None:
        batch = read(Pair(x(), Pair(torch.arange(4), 3)))
        assert batch.take(0, 1).raw.x.shape == (1, 3)
        assert batch.raw.y.y == 3

    def test_mappings_keep_what_they_add(self) -> None:
        encoding = Encoding({"input_ids": x(), "labels": torch.arange(4)}, note="kept")
        raw = read(encoding).take(0, 2).raw
        assert raw.input_ids.shape == (2, 3)
        assert raw.note == "kept"
        assert encoding.input_ids.shape == (4, 3)

    def test_other_mappings_become_dicts(self) -> None:
        raw = read(MappingProxyType({"x": x()})).raw
        assert type(raw) is dict
        assert list(raw) == ["x"]

    def test_reading_leaves_the_batch_alone(self) -> None:
        data = {"x": [x(), x()], "n": ["a", "b", "c", "d"]}
        before = {"x": list(data["x"]), "n": list(data["n"])}
        read(data).take(0, 1).of_one  # noqa: B018 - only that it changes nothing
        assert data == before


class TestTensors:
    def test_are_moved(self) -> None:
        batch = Batch.read(
            (x(), {"t": torch.tensor(1.0)}),
            batch_dim=0,
            device=torch.device("meta"),
            targets_required=True,
        )
        assert batch.raw[0].is_meta
        assert batch.raw[1]["t"].is_meta

    def test_made_in_inference_mode_work_in_autograd(self) -> None:
        with torch.inference_mode():
            batch = read((x(), torch.tensor(2.0)))
        assert not any(t.is_inference() for t in batch.raw)
        weight = torch.ones(3, requires_grad=True)
        (batch.raw[0] @ weight).sum().backward()

    def test_leave_the_users_graph_but_keep_requiring_gradients(self) -> None:
        data = x().requires_grad_() * 2
        (found,) = read((data,)).raw
        assert found.requires_grad
        assert found.is_leaf
        assert not read((x(),)).raw[0].requires_grad


class TestUnreadable:
    @pytest.mark.parametrize(
        "raw", [SimpleNamespace(x=1), "text", 3, None, (), [], {}, iter([1])], ids=repr
    )
    def test_what_is_no_batch(self, raw: Any) -> None:
        with pytest.raises(
            InvalidBatch, match=r"a batch must be a list or tuple \(inputs, \*rest\)"
        ) as error:
            read(raw)
        assert "def forward(model, batch):" in str(error.value)

    def test_objects_that_are_not_one_per_sample(self) -> None:
        with pytest.raises(InvalidBatch, match=r'found SimpleNamespace at batch\[0\]\["graph"\]'):
            read(({"graph": SimpleNamespace(), "x": x()}, torch.arange(4)))

    def test_a_bare_tensor_without_the_targets_that_are_required(self) -> None:
        assert read(x(), targets_required=False).raw.shape == (4, 3)
        with pytest.raises(InvalidBatch, match=r"bare tensor, Tensor\[4, 3\] float32"):
            read(x())

    def test_packed_sequences(self) -> None:
        packed = pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)])
        for raw in ((packed, torch.arange(2)), ([packed], torch.arange(2)), packed):
            with pytest.raises(InvalidBatch, match=r"PackedSequence at batch.* lengths, and pack"):
                read(raw)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.eye(4).to_sparse(),
            torch.nested.nested_tensor([torch.zeros(2)] * 4, layout=torch.jagged),
        ],
    )
    def test_tensors_that_are_not_dense(self, tensor: Tensor) -> None:
        with pytest.raises(InvalidBatch, match=r"must be dense; found .* at batch\[0\]"):
            read((tensor, torch.arange(4)))

    @pytest.mark.parametrize("raw", [(3, "a"), (torch.tensor(1.0), None), torch.tensor(1.0)])
    def test_nothing_to_split(self, raw: Any) -> None:
        with pytest.raises(InvalidBatch, match="at least one tensor with a dimension of samples"):
            read(raw, targets_required=False)

    def test_sizes_that_disagree(self) -> None:
        with pytest.raises(InvalidBatch) as error:
            read((x(8), {"mask": torch.zeros(7, 2), "ids": ["a"] * 8}))
        message = str(error.value)
        assert "batch[0]: 8 in Tensor[8, 3] float32 along dimension 0" in message
        assert 'batch[1]["mask"]: 7 in Tensor[7, 2]' in message
        assert 'batch[1]["ids"]: 8 in list of 8 str\n' in message

    def test_a_dimension_that_is_not_there(self) -> None:
        with pytest.raises(
            InvalidBatch, match=r"here 2; found Tensor\[4, 3\] float32 at batch\[0\]"
        ):
            read((x(),), batch_dim=2)

    @pytest.mark.parametrize("batch_dim", [-1, True, "0", 1.0])
    def test_a_batch_dim_that_is_none(self, batch_dim: Any) -> None:
        with pytest.raises(ValueError, match="an integer >= 0; found"):
            read((x(),), batch_dim=batch_dim)


class Recorder(nn.Module):
    """Returns how it was called."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs


class TwoInputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class TestApply:
    @pytest.mark.parametrize(
        ("raw", "args", "kwargs", "rest"),
        [
            ((1, 2, 3), (1,), {}, (2, 3)),
            ([1], (1,), {}, ()),
            (((x(), 2), 3), None, {}, (3,)),
            (({"a": 1}, 2), (), {"a": 1}, (2,)),
            ({"a": 1, "labels": 2}, (), {"a": 1}, (2,)),
            (UserDict({"a": 1}), (), {"a": 1}, ()),
            ((["one", "object per sample"], 2), (["one", "object per sample"],), {}, (2,)),
        ],
        ids=str,
    )
    def test_calls_the_model(self, raw: Any, args: Any, kwargs: Any, rest: Any) -> None:
        outputs, found = apply(Recorder(), raw)
        assert found == rest
        assert outputs[1] == kwargs
        if args is None:
            args = raw[0]
        assert outputs[0] == tuple(args)

    def test_a_bare_tensor(self) -> None:
        data = x()
        assert apply(nn.Identity(), data) == (data, ())

    def test_a_forward_has_the_whole_batch(self) -> None:
        batch = {"a": 1, "labels": 2}
        model = nn.Identity()
        outputs, rest = apply(model, batch, lambda m, b: (m, b))
        assert outputs[0] is model
        assert outputs[1] is batch
        assert rest == (2,)

    def test_logits_are_taken(self) -> None:
        outputs = SimpleNamespace(logits=x())
        assert torch.equal(apply(nn.Identity(), (outputs,))[0], x())
        assert torch.equal(apply(nn.Identity(), (1,), lambda m, b: outputs)[0], x())
        without = SimpleNamespace(logits=None)
        assert apply(nn.Identity(), (without,))[0] is without

    @pytest.mark.parametrize(
        "raw", [(x(), x(), x()), ({"a": x(), "c": x()}, x()), {"a": x(), "labels": x()}], ids=str
    )
    def test_a_model_with_other_arguments(self, raw: Any) -> None:
        with pytest.raises(
            InvalidBatch, match=r"TwoInputs\.forward\(a: .*found the batch"
        ) as error:
            apply(TwoInputs(), raw)
        assert "def forward(model, batch):" in str(error.value)
        assert isinstance(error.value.__cause__, TypeError)

    def test_type_errors_of_the_model_are_its_own(self) -> None:
        with pytest.raises(TypeError, match="unsupported operand"):
            apply(TwoInputs(), ((x(), "b"), x()))

    def test_type_errors_of_a_model_without_a_signature_are_its_own(self) -> None:
        class Largest(nn.Module):
            forward = staticmethod(max)

        with pytest.raises(TypeError, match="not iterable"):
            apply(Largest(), (1, x()))


@pytest.mark.parametrize(
    "raw", [(x(), x(), x()), {"pixel_values": x()}, SimpleNamespace(), []], ids=str
)
def test_the_forward_to_write_is_python(raw: Any) -> None:
    with pytest.raises(InvalidBatch) as error:
        apply(TwoInputs(), raw) if isinstance(raw, (tuple, dict)) else read(raw)
    template = str(error.value).partition("    def forward")[2]
    compile("def forward" + template.replace("\n    ", "\n"), "template", "exec")


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
        ],
    )
    def test_of_batches_alike(self, make: Any) -> None:
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
            ((x(), ["a", "b", "c", "d"]), (x(), ["a", "b", "c", "d"])),
        ],
    )
    def test_not_of_others(self, one: Any, other: Any) -> None:
        parts = [read(each, targets_required=False) for each in (one, other)]
        assert not parts[0].joins(parts[1])
