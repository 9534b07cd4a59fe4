"""Where modules beside the model are found."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
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
    "partial": lambda module: functools.partial(with_module, module=module),
    "partial of a method": lambda module: functools.partial(Holder(module).forward),
    "closure of a closure": lambda module: closure(nn.Identity()) and closure_of(closure(module)),
    "likelihood": lambda module: Custom(closure(module)),
    "method of a module": lambda module: module.forward,
}


def closure_of(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, batch: function(model, batch)


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_function_holds(name: str) -> None:
    model, other = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    assert reachable(model, MAKERS[name](other)).modules == [other]
    assert reachable(model, MAKERS[name](model)).modules == []


@pytest.mark.parametrize("root", [by_global, by_helper, by_inner_function, Delegating()])
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
