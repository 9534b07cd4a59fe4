"""The penalty at a point that is not the model's own: `ewc(at={...})`."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification, OnlineEWC
from tests.support.asserts import assert_close, raises
from tests.support.tasks import CLASSES, INPUTS, make, make_model, make_task

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def point(model: nn.Module, seed: int = 3, **factory: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(each.shape, generator=generator, **factory).requires_grad_()
        for name, each in model.named_parameters()
    }


def quadratic(ewc: EWC, at: Mapping[str, Tensor]) -> Tensor:
    """The penalty in float64, by plain operations, but for its constant."""
    return (
        0.5
        * ewc.strength
        * sum(
            (ewc.fisher[name].double() * (at[name].double() - ewc.anchor[name].double()) ** 2).sum()
            for name in ewc.fisher
        )
    )


def constant(ewc: EWC, model: nn.Module) -> Tensor:
    return ewc().double() - quadratic(ewc, dict(model.named_parameters()))


@pytest.mark.parametrize("kind", [EWC, OnlineEWC])
def test_value_and_gradient(kind: type[EWC]) -> None:
    model, ewc = make(kind, n_tasks=2, strength=3.0)
    at = point(model)
    value = ewc(at=at)
    expected = quadratic(ewc, at)
    torch.testing.assert_close(value.double(), expected + constant(ewc, model))
    found = torch.autograd.grad(value, list(at.values()))
    right = torch.autograd.grad(expected, list(at.values()))
    assert_close(dict(zip(at, found, strict=True)), dict(zip(at, right, strict=True)), 1e-5)


def test_own_parameters_in_place_of_those_left_out() -> None:
    model, ewc = make(EWC, strength=3.0)
    at = {"2.bias": point(model)["2.bias"]}
    value = ewc(at)
    torch.testing.assert_close(
        value.double(), quadratic(ewc, {**dict(model.named_parameters()), **at})
    )
    value.backward()
    assert at["2.bias"].grad is not None
    assert model[0].weight.grad is not None
    assert model[2].bias.grad is None
    torch.testing.assert_close(ewc(at={}), ewc())
    torch.testing.assert_close(ewc(at=dict(model.named_parameters())), ewc())


def test_through_what_made_it() -> None:
    """A hypernetwork, and an adapter."""
    model, ewc = make(EWC, strength=3.0)
    shapes = {name: each.shape for name, each in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    hyper = nn.Linear(4, sum(sizes))
    made = hyper(torch.ones(4)).split(sizes)
    at = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), made, strict=True)}
    found = torch.autograd.grad(ewc(at=at), list(hyper.parameters()), retain_graph=True)
    right = torch.autograd.grad(quadratic(ewc, at), list(hyper.parameters()))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)

    down, up = (torch.randn(2, INPUTS).requires_grad_(), torch.randn(7, 2).requires_grad_())
    at = {"0.weight": model[0].weight.detach() + 0.5 * up @ down}
    ewc(at=at).backward()
    others = {n: each.detach() for n, each in model.named_parameters()}
    right = torch.autograd.grad(
        quadratic(ewc, {**others, "0.weight": others["0.weight"] + 0.5 * up @ down}), [up, down]
    )
    torch.testing.assert_close(up.grad, right[0])
    torch.testing.assert_close(down.grad, right[1])


def test_second_derivatives() -> None:
    model, ewc = make(EWC, strength=3.0)
    at = point(model)
    (gradient,) = torch.autograd.grad(ewc(at=at), at["2.bias"], create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), at["2.bias"])
    torch.testing.assert_close(second, 3.0 * ewc.fisher["2.bias"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.01)])
def test_other_dtypes_than_the_parameters(dtype: torch.dtype, tolerance: float) -> None:
    """The gradient has the dtype of the point, and is not narrowed to that of the parameters."""
    model, ewc = make(EWC, strength=3.0)
    model.to(torch.bfloat16)
    at = point(model, dtype=torch.float32)
    at = {name: each.detach().to(dtype).requires_grad_() for name, each in at.items()}
    value = ewc(at=at)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), quadratic(ewc, at), rtol=1e-5, atol=0)
    value.backward()
    right = torch.autograd.grad(quadratic(ewc, at), list(at.values()))
    for one, other in zip(at.values(), right, strict=True):
        assert one.grad.dtype is dtype
        torch.testing.assert_close(
            one.grad, other, rtol=1e-5 if dtype.itemsize > 2 else 0.01, atol=0
        )


def test_compiled() -> None:
    model, ewc = make(EWC, n_tasks=2, strength=3.0)
    at = point(model)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def penalty(at: dict[str, Tensor]) -> Tensor:
        return ewc(at=at)

    value = penalty(at)
    torch.testing.assert_close(value, ewc(at=at))
    found = torch.autograd.grad(value, list(at.values()))
    for one, other in zip(found, torch.autograd.grad(ewc(at=at), list(at.values())), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_the_parameters_compiled_or_not(dtype: torch.dtype) -> None:
    model, ewc = make(EWC, make_model(dtype=torch.float64), n_tasks=0, strength=3.0)
    ewc.consolidate([(x.double(), y) for x, y in make_task()])
    at = {name: (p + 0.3).detach().to(dtype) for name, p in model.named_parameters()}
    compiled = torch.compile(lambda at: ewc(at=at), backend="eager", fullgraph=True)
    mapped = torch.func.vmap(lambda values: ewc(at=values))
    stacked = mapped({name: each.unsqueeze(0) for name, each in at.items()})
    for value in (ewc(at=at), compiled(at), stacked.squeeze(0)):
        assert value.dtype is torch.float64
        torch.testing.assert_close(value, quadratic(ewc, at), rtol=1e-12, atol=0)


def test_tied_parameters_by_any_of_their_names_and_parameters_that_are_free() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(INPUTS, INPUTS)
            self.two = nn.Linear(INPUTS, INPUTS)
            self.two.weight = self.one.weight
            self.head = nn.Linear(INPUTS, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(x).tanh()))

    model = Tied()
    ewc = EWC(model, Classification(), parameters=["one.weight", "two.bias"], strength=1.0)
    ewc.consolidate(make_task())
    value = torch.randn(INPUTS, INPUTS)
    expected = ewc(at={"one.weight": value})
    assert expected > 0
    assert ewc(at={"two.weight": value}) == expected
    assert ewc(at={"two.weight": value, "head.bias": torch.ones(CLASSES)}) == expected


def test_a_head_that_has_grown() -> None:
    model, ewc = make(EWC, strength=1.0)
    before = ewc()
    grown = nn.Linear(7, CLASSES + 2)
    with torch.no_grad():
        grown.weight[:CLASSES], grown.bias[:CLASSES] = model[2].weight, model[2].bias
    model[2] = grown
    at = {"2.weight": grown.weight.detach() + torch.eye(CLASSES + 2, 7)}
    assert ewc(at=at) > before
    at = {"2.weight": torch.cat([grown.weight[:CLASSES].detach(), torch.ones(2, 7)])}
    torch.testing.assert_close(ewc(at=at), before)


def test_before_the_first_consolidation() -> None:
    model = make_model()
    ewc = EWC(model, Classification(), strength=1.0)
    assert ewc(at=point(model)) == 0
    ewc(at=point(model)).backward()
    with pytest.raises(ValueError, match="no parameter is named 'elsewhere'"):
        ewc(at={"elsewhere": torch.zeros(1)})


def test_all_that_is_wrong_is_listed() -> None:
    model, ewc = make(EWC)
    at = {
        "0.weigth": torch.zeros(7, INPUTS),
        "0.bias": torch.zeros(8),
        "2.weight": 3.0,
        "2.bias": torch.zeros(CLASSES, dtype=torch.long),
    }
    with raises(
        ValueError,
        "'0.weigth' (nearest: '0.weight'",
        "'0.bias' has shape (8,), the parameter (7,)",
        "'2.weight' is a float",
        "'2.bias' has dtype torch.int64, the parameter torch.float32",
    ):
        ewc(at=at)
    with pytest.raises(TypeError, match="at must be a mapping"):
        ewc(at=[torch.zeros(7)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_points_narrow_ones_and_buffers() -> None:
    model = make_model()
    model.register_buffer("seen", torch.zeros(()))
    _, ewc = make(EWC, model)
    with raises(
        ValueError,
        "'0.weight' has no entries that can be read: it is nested",
        "'0.bias' has dtype torch.float8_e4m3fn, the parameter torch.float32",
        "no parameter is named 'seen'",
        "Fix: take names from the property fisher, without the prefixes of wrappers, and leave "
        "out buffers.",
    ):
        ewc(
            at={
                "0.weight": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
                "0.bias": torch.zeros(7).to(torch.float8_e4m3fn),
                "seen": torch.zeros(()),
            }
        )


def test_what_cannot_be_read_and_one_parameter_given_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(INPUTS, CLASSES), nn.Linear(INPUTS, CLASSES)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) * self.two(x)

    ewc = EWC(Tied(), Classification(), strength=1.0)
    ewc.consolidate(make_task())
    weight = torch.randn(CLASSES, INPUTS)
    assert ewc(at={"one.weight": weight, "two.weight": weight}) == ewc(at={"one.weight": weight})
    with raises(
        ValueError,
        "'one.weight' and 'two.weight' are one parameter",
        "'one.bias' has no entries that can be read: it is on the meta device",
        "'two.bias' has no entries that can be read: it is not dense (torch.sparse_coo)",
    ):
        ewc(
            at={
                "one.weight": weight,
                "two.weight": 2 * weight,
                "one.bias": torch.zeros(CLASSES, device="meta"),
                "two.bias": torch.zeros(CLASSES).to_sparse(),
            }
        )


@pytest.mark.parametrize("kind", [EWC, OnlineEWC])
def test_inside_transforms(kind: type[EWC]) -> None:
    _, ewc = make(kind, n_tasks=2, strength=3.0)
    at = {name: each.detach() for name, each in point(ewc._model).items()}
    leaves = {name: each.clone().requires_grad_() for name, each in at.items()}
    right = torch.autograd.grad(ewc(at=leaves), list(leaves.values()))
    found = torch.func.grad(lambda values: ewc(at=values))(at)
    assert_close(found, dict(zip(at, right, strict=True)), 1e-5)
    several = {name: torch.stack([each, 2 * each]) for name, each in at.items()}
    values = torch.func.vmap(lambda values: ewc(at=values))(several)
    twice = ewc(at={name: 2 * each for name, each in at.items()})
    torch.testing.assert_close(values, torch.stack([ewc(at=at), twice]))
