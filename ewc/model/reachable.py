"""What the code of a collection may run and read beside the model.

A `forward`, a likelihood or the model itself may use another network: a frozen encoder, a teacher.
It is found where Python code keeps such things, and guarded like the model. The same search
describes all that it passes, so that a later collection can see what has changed.
"""

import dis
import sys
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from types import (
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import torch
from torch import Tensor, nn

_STEPS = 5
"""How far the search goes: a function, what it closes over, what that holds, and so on."""

_VISITED = 5000
"""The number of objects after which the search ends."""

_LARGE = 100
"""What is in a container with more items is searched last."""

_LIBRARIES = frozenset({*sys.stdlib_module_names, "builtins", "ewc", "numpy", "torch"})
"""Packages whose functions use no modules but those that they are given."""

_OWN = ("ewc.likelihoods", "ewc.integrations")
"""The library's own packages whose objects are followed: they hold functions of the user's."""

_NAMESPACES = (SimpleNamespace, Namespace)
"""Classes of the standard library that hold attributes of the user's."""

_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
"""The instructions that load global variables; the second one in the body of a class."""

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
"""Values that are described by themselves."""

STANDARD = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


@dataclass(frozen=True)
class Reachable:
    """What a search has found.

    Attributes:
        modules: The modules that may run and are not the model's own, without their submodules.
        description: What the search has passed, in order: the code of functions, plain values,
            the shapes and dtypes of tensors, and other objects by identity. Two descriptions are
            equal if nothing has changed, as far as the search goes.
    """

    modules: list[nn.Module]
    description: list[Hashable]


class Identity:
    """Stands for one object, which it does not keep alive; equal as long as the object lives.

    Args:
        value: The object.
    """

    def __init__(self, value: object) -> None:
        self._value: Callable[[], object]
        try:
            self._value = weakref.ref(value)
        except TypeError:  # a number of NumPy, an object with slots
            self._value = lambda: value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return False
        value = self._value()
        return value is not None and value is other._value()

    def __hash__(self) -> int:
        return 0  # it changes when the object dies; these are compared, not looked up


def reachable(model: nn.Module, *roots: Any) -> Reachable:
    """What a model or some functions and objects may run and read.

    Followed are what a function closes over, its defaults, what it wraps, and the global names in
    its code; the object of a bound method; the arguments of `functools.partial`; the attributes of
    an object; the items of containers. Of the model, its `forward` methods and what its attributes
    hold are followed.

    Args:
        model: The model.
        roots: Functions and objects.
    """
    own = set(map(id, model.modules()))
    found: dict[int, nn.Module] = {}
    description: list[Hashable] = []
    visited: dict[int, Any] = {}
    waiting: deque[tuple[Any, int]] = deque((root, 0) for root in roots)
    waiting.extend((each, _STEPS - 2) for each in _of_model(model))
    in_large: deque[tuple[Any, int]] = deque()  # a vocabulary must not end the search for others
    while (waiting or in_large) and len(visited) < _VISITED:
        value, step = (waiting or in_large).popleft()
        try:
            description.append(_described(value))
            if id(value) in visited:
                continue
            visited[id(value)] = value  # kept, so that no other object gets its identity
            if isinstance(value, nn.Module):
                if id(value) not in own:
                    found[id(value)] = value
            elif step < _STEPS:
                inside = [(each, step + 1) for each in _within(value)]
                if len(inside) <= _LARGE:
                    waiting.extend(inside)
                elif len(in_large) < _VISITED:
                    in_large.extend(inside)
        except Exception:  # to look into an object may run code of its class
            description.append(Identity(value))
    inner = {id(each) for outer in found.values() for each in outer.modules() if each is not outer}
    modules = [module for key, module in found.items() if key not in inner]
    return Reachable(modules, description)


def describe_tensor(tensor: Tensor) -> Hashable:
    """All of a tensor but its values."""
    with torch._C.DisableTorchFunctionSubclass():
        try:
            shape: Hashable = tensor.shape
        except RuntimeError:  # a nested tensor, or a parameter that is not initialised yet
            shape = None
        return (
            type(tensor),
            shape,
            tensor.dtype,
            tensor.device,
            tensor.layout,
            tensor.requires_grad,
        )


def _described(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return describe_tensor(value)
    if isinstance(value, FunctionType):
        return value.__code__
    if isinstance(value, MethodType):
        return value.__func__.__code__ if isinstance(value.__func__, FunctionType) else MethodType
    if isinstance(value, Mapping):
        keys = list(islice(value, _VISITED))
        return type(value), tuple(key for key in keys if isinstance(key, _PLAIN)), len(value)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return type(value), len(value)
    return Identity(type(value) if _is_followed(value) else value)


def _of_model(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from (value for name, value in vars(module).items() if name not in STANDARD)
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        yield from _methods(kind)


def _within(value: Any) -> Iterable[Any]:
    """What a value holds or names, as far as it may lead to a module."""
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, Mapping):
        return list(islice(value.values(), _VISITED))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(islice(value, _VISITED))
    if not _is_followed(value):
        return ()
    return (*getattr(value, "__dict__", {}).values(), *_slots(value), *_methods(type(value)))


def _slots(value: Any) -> Iterator[Any]:
    for kind in type(value).__mro__:
        for each in vars(kind).values():
            if isinstance(each, MemberDescriptorType):
                with suppress(AttributeError):  # it is not set
                    yield each.__get__(value)


def _methods(kind: type) -> Iterator[FunctionType]:
    """The methods of a class and of those it inherits from, without those of libraries."""
    for each in (each for base in kind.__mro__ for each in vars(base).values()):
        if isinstance(each, FunctionType) and not _is_of_library(each):
            yield each


def _is_followed(value: Any) -> bool:
    """Whether the attributes and methods of an object are followed."""
    if isinstance(value, (type, ModuleType, Tensor, nn.Module)):
        return False
    return (
        not _is_of_library(type(value))
        or type(value).__module__.startswith(_OWN)
        or isinstance(value, _NAMESPACES)
    )


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
    loaded, names = _names(function.__code__)
    for name in loaded & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, ModuleType):
            if value.__name__.split(".")[0] not in _LIBRARIES:
                yield from (vars(value)[each] for each in names & vars(value).keys())
        else:
            yield value


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names in a code and in the functions that are defined in it; and all names.

    A name that is only an attribute is no global name, even where a global variable has it too.
    """
    loaded = {each.argval for each in dis.get_instructions(code) if each.opname in _LOADS}
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_loaded, inner_names = _names(constant)
            loaded |= inner_loaded
            names |= inner_names
    return frozenset(loaded), frozenset(names)


def _is_of_library(value: Any) -> bool:
    return _package(value) in _LIBRARIES


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "").partition(".")[0]
