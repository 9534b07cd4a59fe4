"""The attributes of modules, which a forward pass may change, as deep as they go."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ewc._refusals import unless_refused
from ewc.model.reachable import STANDARD

_LARGE = 1000
"""A container with more items is compared by its size after each run, and item by item at last."""

_WALKED = 10_000
"""The items of a container with more of them, such as a vocabulary, are not looked into."""

_SNAPSHOT_BYTES = 2**28
"""How much memory copies of the tensors in attributes may take."""


class Attributes:
    """The attributes of modules, and the dicts, lists and sets in them.

    Args:
        modules: The modules.

    Attributes:
        tensors: The tensors in them that a forward pass may write to, other than parameters,
            buffers, and what is made of tensors that require a gradient.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._saved: dict[int, _Saved] = {}
        self._start: _Start | None = None
        self.tensors: list[Tensor] = []
        self._registered = {
            id(each)
            for module in self._modules
            for each in (*module._parameters.values(), *module._buffers.values())
        }
        known, room = set(self._registered), _SNAPSHOT_BYTES
        for module in self._modules:
            for space in (module.__dict__, module._buffers, module._parameters, module._modules):
                if isinstance(space, dict):  # not those of a scripted module, which are read-only
                    self._saved[id(space)] = _Saved(space, is_namespace=True)
            for _, value in _attributes(module):
                for each in _nested(value):
                    if not isinstance(each, Tensor):
                        self._saved.setdefault(id(each), _Saved(each))
                    elif type(each) is Tensor and each.is_leaf and id(each) not in known:
                        known.add(id(each))
                        if each.layout is torch.strided and each.nbytes <= room:
                            room -= each.nbytes
                            self.tensors.append(each)

    def restore(self) -> None:
        """Undo what the last run has changed."""
        if self._start is None:
            self._start = _Start(self._saved.values())
        if self._start.is_changed():
            for each in self._saved.values():
                each.restore()

    def restore_originals(self) -> None:
        """Restore the attributes to what they were when this was made."""
        self._start = None
        for each in self._saved.values():
            each.start = each.original
            each.restore(thoroughly=True)

    def empty_caches(self, run: Callable[[], object]) -> None:
        """Empty caches of what is made of parameters, for every run from now on.

        In eval mode, a model may keep what it has made of parameters, in an attribute or in a dict,
        and take it from there in the next run. Filled under `no_grad`, it has no graph; filled
        before, its graph is that of another run. It is a cache if a run fills it again after it was
        emptied, with a tensor that has a graph. Otherwise it is left as it is.

        Args:
            run: Runs the model once.
        """
        groups = self._groups()
        if not groups:
            return
        run()
        # A cache is written once; a state, such as that of a recurrent network, by every run.
        written = {holder for group in groups.values() for holder in group if holder.is_written()}
        self.restore()
        done = set()
        for (kind, name, _), group in groups.items():
            kept = [holder for holder in group if holder not in written]
            if kept and (kind, name) not in done and self._are_caches(kept, run):
                done.add((kind, name))

    def _groups(self) -> dict[tuple[type, str, bool], list["_Holder"]]:
        """What may be caches: of the modules of one class, attributes of one name.

        First the containers that are attributes themselves, then those inside that hold tensors.
        """
        groups: dict[tuple[type, str, bool], list[_Holder]] = {}
        for module in self._modules:
            for name, value in _attributes(module):
                if isinstance(value, Tensor):
                    if self._may_be_cached(value) and id(vars(module)) in self._saved:
                        group = groups.setdefault((type(module), name, True), [])
                        group.append(_Holder(self._saved[id(vars(module))], name))
                    continue
                inner = [each for each in _nested(value) if self._holds_cached(each)]
                for is_outer, containers in ((True, [value] if inner else []), (False, inner)):
                    known = [
                        self._saved[id(each)] for each in containers if id(each) in self._saved
                    ]
                    if known:
                        group = groups.setdefault((type(module), name, is_outer), [])
                        group += map(_Holder, known)
        return groups

    def _are_caches(self, group: list["_Holder"], run: Callable[[], object]) -> bool:
        """Whether a run fills these again, which then stay empty."""

        def are_filled() -> bool:
            self.restore()
            run()
            return any(holder.is_filled_again() for holder in group)

        # An attribute is None before it is made, or is not there (`cached_property`, `hasattr`).
        named = any(holder.name is not None for holder in group)
        is_filled = False
        for delete in (False, True) if named else (False,):
            for holder in group:
                holder.empty(delete=delete)
            self._start = None
            is_filled = bool(unless_refused(are_filled))  # a model may need what was in them
            if is_filled:
                break
            for holder in group:
                holder.refill()
            self._start = None
        self.restore()
        return is_filled

    def _holds_cached(self, value: Any) -> bool:
        """Whether a container holds such a tensor itself, or in a tuple."""
        if isinstance(value, Tensor) or len(value) > _WALKED:
            return False
        items = value.values() if isinstance(value, dict) else value
        nested = (each for item in items for each in (item if isinstance(item, tuple) else (item,)))
        return any(map(self._may_be_cached, nested))

    def _may_be_cached(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and not isinstance(value, nn.Parameter)
            and id(value) not in self._registered
            and (value.is_floating_point() or value.is_complex())
            and (value.grad_fn is not None or not value.requires_grad)
        )


class _Saved:
    """A dict, list, set or deque, and what was in it.

    Args:
        container: The container.
        is_namespace: Whether it holds the attributes of a module.

    Attributes:
        container: The container.
        original: What was in it when this was made.
        start: What is in it when a run begins.
        is_large: Whether it is compared by its size after each run.
    """

    def __init__(self, container: Any, *, is_namespace: bool = False) -> None:
        self.container = container
        self.is_large = not is_namespace and len(container) > _LARGE
        copy: Any = dict if isinstance(container, dict) else list
        self.original = self.start = copy(container)

    def restore(self, *, thoroughly: bool = False) -> None:
        """Put back what was in it at the start, if that has changed."""
        if self.is_changed(thoroughly=thoroughly):
            self.container.clear()
            if isinstance(self.container, (dict, set)):
                self.container.update(self.start)
            else:
                self.container.extend(self.start)

    def is_changed(self, *, thoroughly: bool = True) -> bool:
        """Whether it is not as it was at the start; large ones are compared item by item."""
        found, start = self.container, self.start
        if len(found) != len(start):
            return True
        if self.is_large and not thoroughly:
            return False
        if isinstance(found, dict):
            return found.keys() != start.keys() or not all(map(is_, found.values(), start.values()))
        return not all(map(is_, found, start))


class _Start:
    """What is in all containers when a run begins, compared at once.

    After nearly every run nothing has changed, and models have many modules: the comparison is a
    few loops of the interpreter's own, not one for each container.

    Args:
        saved: The containers. Of large ones the sizes are compared.
    """

    def __init__(self, saved: Iterable[_Saved]) -> None:
        saved = list(saved)
        small = [each for each in saved if not each.is_large]
        self._containers = [each.container for each in saved]
        self._lengths = [len(each.start) for each in saved]
        # Views of dicts show what is in them later, too.
        self._parts = [part for each in small for part in _parts(each.container)]
        self._items = [item for each in small for part in _parts(each.start) for item in part]

    def is_changed(self) -> bool:
        """Whether something may have changed; a key deleted and set again counts, too."""
        return list(map(len, self._containers)) != self._lengths or not all(
            map(is_, chain.from_iterable(self._parts), self._items)
        )


def _parts(container: Any) -> tuple[Iterable[Any], ...]:
    return (container, container.values()) if isinstance(container, dict) else (container,)


@dataclass(frozen=True)
class _Holder:
    """What may be a cache.

    Attributes:
        saved: A container or, if `name` is given, the attributes of a module.
        name: The name of the one of them that is a tensor.
    """

    saved: _Saved
    name: str | None = None

    def is_written(self) -> bool:
        """Whether a run has changed it."""
        if self.name is None:
            return self.saved.is_changed()
        return self.saved.container.get(self.name) is not self.saved.original[self.name]

    def empty(self, *, delete: bool) -> None:
        """Let runs begin with an empty container, with None as the attribute, or without it."""
        start = self.saved.start
        if self.name is None:
            self.saved.start = type(start)()
        elif delete:
            self.saved.start = {key: each for key, each in start.items() if key != self.name}
        else:
            self.saved.start = {**start, self.name: None}

    def refill(self) -> None:
        """Undo `empty`."""
        start, original = self.saved.start, self.saved.original
        self.saved.start = (
            original if self.name is None else {**start, self.name: original[self.name]}
        )

    def is_filled_again(self) -> bool:
        """Whether a run has put tensors with a graph where some were before it was emptied."""
        found, original = self.saved.container, self.saved.original
        if self.name is not None:
            value = found.get(self.name)
            return _has_graph(value) and value.shape == original[self.name].shape
        if isinstance(found, dict):
            return any(_has_graph(value) for key, value in found.items() if key in original)
        return any(map(_has_graph, found))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that a module has of its own, and the containers of its class."""
    yield from ((name, each) for name, each in vars(module).items() if name not in STANDARD)
    for kind in type(module).__mro__:
        if kind.__module__.split(".")[0] not in ("torch", "builtins"):
            for name, each in vars(kind).items():
                if isinstance(each, (dict, list, set)) and not name.startswith("__"):
                    yield name, each


def _nested(value: Any, visited: set[int] | None = None) -> Iterator[Any]:
    """The containers in a value, itself included, that can be changed, and all tensors."""
    visited = set() if visited is None else visited
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, set, deque, tuple)) and id(value) not in visited:
        visited.add(id(value))
        if not isinstance(value, tuple):
            yield value
        if len(value) <= _WALKED:
            for each in value.values() if isinstance(value, dict) else value:
                yield from _nested(each, visited)


def _has_graph(value: Any) -> bool:
    return any(isinstance(each, Tensor) and each.grad_fn is not None for each in _nested(value))
