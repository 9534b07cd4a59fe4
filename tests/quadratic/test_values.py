"""Values of subclass types in a state: the next checkpoint is readable with `weights_only=True`."""

import enum
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification, OnlineEWC
from ewc.quadratic.values import equal, plain_float, plain_int, plain_tensor, shown
from tests.support.asserts import raises, unchanged
from tests.support.tasks import make, make_model, make_task, same, same_state


class Tagged(Tensor):
    """A tensor class of a user's own."""


class Text(str):
    __slots__ = ()


class Word(str, enum.Enum):
    WEIGHT = "0.weight"


class Real(float):
    pass


class Whole(int):
    pass


def with_tensors(convert):
    def apply(state):
        for key in ("fisher", "anchor"):
            state[key] = {name: convert(one) for name, one in state[key].items()}

    return apply


def with_names(convert):
    def apply(state):
        state["parameters"] = [convert(name) for name in state["parameters"]]
        for key in ("fisher", "anchor", "constant", "free_rows"):
            state[key] = {convert(name): one for name, one in state[key].items()}

    return apply


def with_numbers(real, whole):
    def apply(state):
        state["constant"] = {name: real(one) for name, one in state["constant"].items()}
        state["free_rows"] = {name: whole(one) for name, one in state["free_rows"].items()}
        state["n_tasks"] = whole(state["n_tasks"])
        state["version"] = whole(state["version"])

    return apply


def with_keys(convert):
    def apply(state):
        for key in list(state):
            value = state.pop(key)
            state[convert(key)] = convert(value) if isinstance(value, str) else value

    return apply


CONVERSIONS = {
    "np.float64": with_numbers(np.float64, np.int64),
    "np.float32": with_numbers(np.float32, np.int32),
    "arrays of shape []": with_numbers(np.array, np.array),
    "tensors of shape []": with_numbers(
        lambda x: torch.tensor(x, dtype=torch.float64), torch.tensor
    ),
    "subclasses of numbers": with_numbers(Real, Whole),
    "np.str_": with_names(np.str_),
    "subclass of str": with_names(Text),
    "keys": with_keys(np.str_),
    "a tensor class": with_tensors(lambda one: one.as_subclass(Tagged)),
    "nn.Parameter": with_tensors(nn.Parameter),
    "nn.Parameter of a class": with_tensors(lambda one: nn.Parameter(one.as_subclass(Tagged))),
    "with a graph": with_tensors(lambda one: one.requires_grad_() * 1),
    "transposed": with_tensors(lambda one: one.t().contiguous().t()),
    "negated twice": with_tensors(lambda one: torch._neg_view(-one)),
    "arrays": with_tensors(Tensor.numpy),
    "arrays of the other byte order": with_tensors(lambda one: one.numpy().astype(">f4")),
    "reversed arrays": with_tensors(lambda one: one.flip(0).numpy()[::-1]),
    "read-only arrays": with_tensors(
        lambda one: np.frombuffer(one.numpy().tobytes(), "f4").reshape(one.shape)
    ),
}


def exact_types(value):
    """Whether all parts of a state are of exactly the plain types."""
    if isinstance(value, dict):
        return type(value) is dict and all(
            type(key) is str and exact_types(one) for key, one in value.items()
        )
    if isinstance(value, list):
        return type(value) is list and all(map(exact_types, value))
    return type(value) in (Tensor, str, int, float)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
@pytest.mark.parametrize("kind", [EWC, OnlineEWC])
def test_converted_on_the_way_in(kind, convert):
    model, ewc = make(kind, n_tasks=2)
    state = ewc.state_dict()
    convert(state)
    other = kind(model, Classification())
    other.load_state_dict(state)
    assert same_state(other, ewc.fisher, ewc.anchor)
    assert (other.n_tasks, other().item()) == (2, pytest.approx(ewc().item()))
    again = other.state_dict()
    assert exact_types(again)
    buffer = io.BytesIO()
    torch.save(again, buffer)
    buffer.seek(0)
    third = kind(model, Classification())
    third.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(third.fisher, ewc.fisher)


def test_names_of_an_enumeration():
    model, ewc = make(EWC)
    ewc.forget("0.bias", "2.weight", "2.bias")
    state = ewc.state_dict()
    state = {
        key: {Word.WEIGHT: one["0.weight"]} if isinstance(one, dict) else one
        for key, one in state.items()
    }
    state["parameters"] = [Word.WEIGHT]
    other = EWC(model, Classification(), parameters=["0.weight"])
    other.load_state_dict(state)
    assert exact_types(other.state_dict())
    assert list(other.fisher) == ["0.weight"]


def test_a_complex_anchor_that_is_a_lazy_conjugate():
    model = nn.Sequential(nn.Linear(5, 3))
    model[0].weight = nn.Parameter(torch.randn(3, 5, dtype=torch.complex64))
    ewc = EWC(model, Classification(), forward=lambda m, b: (b[0].cfloat() @ m[0].weight.T).real)
    with pytest.warns(UserWarning, match="zero"):
        ewc.consolidate(make_task())
    state = ewc.state_dict()
    anchor = state["anchor"]["0.weight"]
    state["anchor"]["0.weight"] = anchor.conj().resolve_conj().conj()
    other = EWC(model, Classification())
    other.load_state_dict(state)
    assert not other.anchor["0.weight"].is_conj()
    assert torch.equal(other.anchor["0.weight"], anchor)


def test_parameters_and_a_prior_of_a_tensor_class():
    model = make_model()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Tagged))
    prior = {np.str_("0.bias"): nn.Parameter(torch.ones(7)).as_subclass(Tagged)}
    ewc = OnlineEWC(model, Classification(), prior_precision=prior)
    assert exact_types(ewc.state_dict())
    ewc.consolidate(make_task())
    assert exact_types(ewc.state_dict())
    assert all(type(one) is Tensor for one in (*ewc.fisher.values(), *ewc.anchor.values()))
    other = OnlineEWC(model, Classification(), prior_precision={"0.bias": torch.ones(7)})
    other.load_state_dict(ewc.state_dict())


class TestRefused:
    def test_a_tensor_that_wraps_others(self):
        from torch._subclasses import FakeTensorMode

        model, ewc = make(EWC)
        state = ewc.state_dict()
        with FakeTensorMode():
            state["fisher"]["0.bias"] = torch.zeros(7)
        with unchanged(ewc, model), raises(ValueError, "be a plain tensor; found FakeTensor"):
            ewc.load_state_dict(state)

    @pytest.mark.parametrize("value", [np.zeros(7, "f2"), np.zeros(7, "i8"), np.array(["a"] * 7)])
    def test_arrays_of_another_type(self, value):
        model, ewc = make(EWC)
        state = ewc.state_dict()
        state["fisher"]["0.bias"] = value
        with unchanged(ewc, model), raises(ValueError, "fisher['0.bias'] must have dtype"):
            ewc.load_state_dict(state)


def test_numbers():
    assert plain_int(np.int64(3)) == 3
    assert [plain_int(one) for one in (True, np.bool_(True), 1.0, "1", None)] == [None] * 5
    assert plain_float(2) == 2.0
    assert plain_float(10**400) == float("inf")
    assert [
        plain_float(one) for one in (True, 1j, "1", torch.zeros(2), torch.zeros((), device="meta"))
    ] == [None] * 5


def test_equal_options():
    assert equal(np.str_("mean"), "mean")
    assert equal(np.float64(0.5), 0.5)
    assert not equal(np.array(["mean", "mean"]), "mean")
    assert not equal(torch.zeros(3), "mean")
    assert not equal("0.5", 0.5)
    assert equal({"a": np.ones(2)}, {"a": torch.ones(2)})
    assert equal({"a": torch.ones(2).half()}, {"a": torch.ones(2)})
    assert not equal({"a": torch.ones(2, device="meta")}, {"a": torch.ones(2)})
    assert not equal({"a": torch.ones(()).expand(10**12)}, {"a": torch.ones(2)})


def test_plain_tensor_shares_memory():
    one = torch.zeros(3).as_subclass(Tagged)
    plain_tensor(one).fill_(1.0)
    assert one.sum() == 3.0


class TestShown:
    def test_is_short(self):
        deep = {}
        deep["self"] = deep
        for value in (list(range(1000)), "x" * 10**6, {i: i for i in range(99)}, deep, [deep] * 5):
            assert len(shown(value)) < 300

    def test_tensors_by_shape(self):
        assert shown(torch.zeros(()).expand(10**12)) == "a tensor of shape (1000000000000,)"
        assert shown({"a": np.zeros((2, 3))}) == "{'a': an array of shape (2, 3)}"
        assert shown(torch.zeros(2, device="meta")) == "a tensor of shape (2,) on the meta device"

    def test_a_repr_that_fails(self):
        class Broken:
            def __repr__(self):
                raise RuntimeError

        assert "Broken" in shown(Broken())
        assert shown(10**10000)
