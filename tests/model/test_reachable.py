"""Where modules beside the model are found."""

import functools
import gc
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ewc import Custom
from ewc.model.reachable import reachable

GLOBAL = nn.Linear(2, 2)


def by_global(model: nn.Module, batch: Any) -> Any:
    return model(GLOBAL(batch[0]))


def by_helper(model: nn.Module, batch: Any) -> Any:
    return by_global(model, batch)


def by_inner_function(model: nn.Module, batch: Any) -> Any:
    return [model(each) for each in (lambda x: GLOBAL(x))(batch)]


class Holder:
    def __init__(self, module: nn.Module) -> None:
        self.modules = {"teacher": [module]}

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(self.modules["teacher"][0](batch[0]))

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return self.forward(model, batch)


class Delegating:
    """Its method names a global."""

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return by_global(model, batch)


class Inheriting(Delegating):
    """It inherits the method that names a global."""


@dataclass(slots=True)
class Slots:
    """It has no dictionary of attributes."""

    module: nn.Module


def closure(module: nn.Module) -> Callable[..., Any]:
    return lambda model, batch: model(module(batch[0]))


def default(module: nn.Module) -> Callable[..., Any]:
    return lambda model, batch, inner=module: model(inner(batch[0]))


def keyword_default(module: nn.Module) -> Callable[..., Any]:
    return lambda model, batch, *, inner=module: model(inner(batch[0]))


def wrapped(module: nn.Module) -> Callable[..., Any]:
    @functools.wraps(closure(module))
    def outer(*args: Any) -> Any:
        return None

    return outer


def with_module(model: nn.Module, batch: Any, module: nn.Module | None = None) -> Any:
    return model(batch[0])


MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "closure": closure,
    "default": default,
    "keyword default": keyword_default,
    "wrapped": wrapped,
    "bound method": lambda module: Holder(module).forward,
    "callable object": Holder,
    "slots": lambda module: closure_of(Slots(module)),
    "namespace": lambda module: closure_of(SimpleNamespace(module=module)),
    "parsed arguments": lambda module: closure_of(Namespace(module=module)),
    "partial": lambda module: functools.partial(with_module, module=module),
    "partial of a method": lambda module: functools.partial(Holder(module).forward),
    "closure of a closure": lambda module: closure(nn.Identity()) and closure_of(closure(module)),
    "likelihood": lambda module: Custom(closure(module)),
    "method of a module": lambda module: module.forward,
}


def closure_of(function: Any) -> Callable[..., Any]:
    return lambda model, batch: function(model, batch)


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_function_holds(name: str) -> None:
    model, other = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    assert reachable(model, MAKERS[name](other)).modules == [other]
    assert reachable(model, MAKERS[name](model)).modules == []


@pytest.mark.parametrize(
    "root", [by_global, by_helper, by_inner_function, Delegating(), Inheriting()]
)
def test_globals_that_the_code_names(root: Any) -> None:
    assert reachable(nn.Linear(2, 2), None, root).modules == [GLOBAL]


def test_what_a_model_hides() -> None:
    class Student(nn.Module):
        def __init__(self, teacher: nn.Module) -> None:
            super().__init__()
            self.layer, self.hidden = nn.Linear(2, 2), [teacher]

    class Global(nn.Module):
        def forward(self, x: Any) -> Any:
            return GLOBAL(x)

    teacher = nn.Linear(2, 2)
    assert reachable(Student(teacher)).modules == [teacher]
    assert reachable(nn.Sequential(Global())).modules == [GLOBAL]


def test_what_holds_itself() -> None:
    holder = Holder(nn.Linear(2, 2))
    holder.own = [holder]  # type: ignore[attr-defined]
    assert len(reachable(nn.Linear(2, 2), holder).modules) == 1


def test_a_vocabulary_does_not_hide_others() -> None:
    model, other, shown = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    model.vocabulary = {str(each): each for each in range(10_000, 20_000)}
    model.documents = [list(range(each, each + 1000)) for each in range(0, 1_000_000, 1000)]
    model.many = [*map(str, range(1000)), shown]
    assert reachable(model, Custom(closure(other))).modules == [other]
    del model.vocabulary, model.documents
    assert reachable(model).modules == [shown]


class Endless(Mapping[int, int]):
    """It cannot be walked through."""

    def __getitem__(self, key: int) -> int:
        return key

    def __iter__(self) -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    def __len__(self) -> int:
        return 1


class Raising(list[int]):
    """It cannot be looked into."""

    def __iter__(self) -> Iterator[int]:
        raise OSError("The file is closed.")


class Subclass(torch.Tensor):
    """It has no attributes."""

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        raise NotImplementedError


def dead_proxy() -> Any:
    proxy = weakref.proxy(nn.Linear(2, 2))
    gc.collect()
    return proxy


AWKWARD: dict[str, Callable[[], Any]] = {
    "endless": Endless,
    "raising": Raising,
    "dead proxy": dead_proxy,
    "nested tensor": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "subclass of tensor": lambda: torch.zeros(2).as_subclass(Subclass),
    "uninitialised parameter": lambda: nn.LazyLinear(2).weight,
    "keys that are tensors": lambda: {torch.zeros(2): 1},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", AWKWARD)
def test_what_cannot_be_looked_into_is_passed_over(name: str) -> None:
    model, other, awkward = nn.Linear(2, 2), nn.Linear(2, 2), AWKWARD[name]()
    found = [reachable(model, closure_of(awkward), closure(other)) for _ in range(2)]
    assert [each.modules for each in found] == [[other], [other]]
    assert found[0].description == found[1].description


@pytest.mark.parametrize("make", [lambda x: Slots(x), lambda x: SimpleNamespace(module=x)])
def test_a_change_of_what_holds_attributes_is_described(make: Callable[[Any], Any]) -> None:
    model, held = nn.Linear(2, 2), make(1)
    before = reachable(model, closure_of(held)).description
    assert reachable(model, closure_of(held)).description == before
    held.module = 2
    assert reachable(model, closure_of(held)).description != before


def test_a_description_keeps_nothing_alive() -> None:
    module = nn.Linear(2, 2)
    held = Slots(module)
    description = reachable(nn.Linear(2, 2), closure_of(held)).description
    kept = weakref.ref(module)
    del module, held
    gc.collect()
    assert description
    assert kept() is None


def by_attribute(model: nn.Module, batch: Any) -> Any:
    return model(batch.GLOBAL(batch[0]))


def test_an_attribute_is_no_global_variable_of_its_name() -> None:
    assert reachable(nn.Linear(2, 2), by_attribute).modules == []
