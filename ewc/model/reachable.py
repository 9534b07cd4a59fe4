"""Modules that the code of a collection may run beside the model.

A `forward`, a likelihood or the model itself may use another network: a frozen encoder, a teacher.
It is found where Python code keeps such things, and guarded like the model.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_STEPS = 5
"""How far the search goes: a function, what it closes over, what that holds, and so on."""

_VISITED = 5000
"""The number of objects after which the search ends."""

_LIBRARIES = frozenset({*sys.stdlib_module_names, "builtins", "ewc", "numpy", "torch"})
"""Packages whose functions use no modules but those that they are given."""

STANDARD = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


def reachable_modules(model: nn.Module, *roots: Any) -> list[nn.Module]:
    """The modules that a model or some functions and objects may run, and that are not its own.

    Followed are what a function closes over, its defaults, what it wraps, and the global names in
    its code; the object of a bound method; the arguments of `functools.partial`; the attributes of
    an object; the items of containers. Of the model, its `forward` methods and what its attributes
    hold are followed.

    Args:
        model: The model.
        roots: Functions and objects.

    Returns:
        The modules, without their submodules.
    """
    own = set(map(id, model.modules()))
    found: dict[int, nn.Module] = {}
    visited: set[int] = set()
    waiting: deque[tuple[Any, int]] = deque((root, 0) for root in roots)
    waiting.extend((each, _STEPS - 2) for each in _of_model(model))
    while waiting and len(visited) < _VISITED:
        value, step = waiting.popleft()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, nn.Module):
            if id(value) not in own:
                found[id(value)] = value
        elif step < _STEPS:
            waiting.extend((each, step + 1) for each in _within(value))
    inner = {id(each) for outer in found.values() for each in outer.modules() if each is not outer}
    return [module for key, module in found.items() if key not in inner]


def _of_model(model: nn.Module) -> Iterator[Any]:
    kinds: set[type] = set()
    for module in model.modules():
        yield from (value for name, value in vars(module).items() if name not in STANDARD)
        kinds.update(type(module).__mro__)
    for kind in kinds:
        for each in vars(kind).values():
            if isinstance(each, FunctionType) and not _is_of_library(each):
                yield each


def _within(value: Any) -> Iterable[Any]:
    """What a value holds or names, as far as it may lead to a module."""
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, Mapping):
        return list(value.values())[:_VISITED]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)[:_VISITED]
    if isinstance(value, (type, ModuleType, Tensor)) or not hasattr(value, "__dict__"):
        return ()
    if _is_of_library(type(value)) and _package(type(value)) != "ewc":
        return ()
    methods = [each for each in vars(type(value)).values() if isinstance(each, FunctionType)]
    return (*vars(value).values(), *methods)


def _of_function(function: FunctionType) -> Iterator[Any]:
    if _is_of_library(function):
        return
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield vars(function).get("__wrapped__")
    names = set(_names(function.__code__))
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, ModuleType):
            if value.__name__.split(".")[0] not in _LIBRARIES:
                yield from (vars(value)[each] for each in names & vars(value).keys())
        else:
            yield value


def _names(code: CodeType) -> Iterator[str]:
    """The names in a code, and in the functions that are defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_of_library(value: Any) -> bool:
    return _package(value) in _LIBRARIES


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "").partition(".")[0]
