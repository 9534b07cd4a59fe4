"""Canonical parameter names, and the parameters that they name.

A plain, a compiled and a DDP-wrapped model have the same canonical names, so that state saved from
one of them loads into the others. Wrappers are recognised by their type: editing strings would
also remove `module.` from the names of a model that has a child called `module`.
"""

import difflib
import heapq
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from ewc._checks import MOST, listed
from ewc.processes.layout import is_fsdp_module, sharded_original

# For each wrapper: the Python module that defines its class, the name of the class, and the key of
# the wrapped module among the wrapper's children. The class is looked up in `sys.modules`, which
# imports nothing: a class that was never imported has no instances.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("lightning.fabric.wrappers", "_FabricModule", "_original_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_original_module"),
)

_CANDIDATES = 32  # how many names `nearest` compares exactly


@dataclass(frozen=True)
class Location:
    """Where a model keeps a parameter.

    Attributes:
        edges: The entries `(dictionary, key)` that lead from the model to the owner module.
        registry: The owner module's dictionary of parameters.
        key: The parameter's key in `registry`.
        fsdp_module: The innermost enclosing module that `fully_shard` was applied to, if any.
    """

    edges: list[tuple[dict[str, Any], str]]
    registry: dict[str, Any]
    key: str
    fsdp_module: nn.Module | None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is there now: the sharded one, even while it is gathered."""
        return sharded_original(self.fsdp_module, self.registry[self.key])

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether `parameter` is at this location now."""
        found = _entry(self.registry, self.key)
        if found is parameter:
            return True
        return found is not None and sharded_original(self.fsdp_module, found) is parameter


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside any number of known wrappers."""
    while (key := _wrapped_key(module)) is not None:
        module = _child(module, key)
    return module


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by canonical name: `module.named_parameters()` without known wrappers.

    A tied parameter appears once, under its first name.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in _walk(unwrap(module), "", set(), None):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


def find(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter with this name in the unwrapped `model`; None if there is none.

    A tied parameter is found by each of its names.
    """
    location = locate(model, name)
    return None if location is None else location.parameter


def locate(model: nn.Module, name: str) -> Location | None:
    """The location of the parameter `name` in the unwrapped `model`; None if there is none."""
    *owners, last = name.split(".")
    found = _follow(model, owners)
    if found is None or _entry(found[0]._parameters, last) is None:
        return None
    module, edges, fsdp_module = found
    return Location(edges, module._parameters, last, fsdp_module)


def is_parametrized(model: nn.Module, name: str) -> bool:
    """Whether `name` is gone because a parametrization was registered on it."""
    *owners, last = name.split(".")
    return _follow(model, [*owners, "parametrizations", last]) is not None


def in_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The distinct `names` in the order of the model's canonical names; unknown ones last."""
    rank = {name: index for index, name in enumerate(named_parameters(model))}
    return sorted(dict.fromkeys(names), key=lambda name: rank.get(name, len(rank)))


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint that an error gives for an unknown `name`: the most similar `known` names."""
    names = list(known)
    candidates = names
    if len(names) > _CANDIDATES:  # an exact comparison with thousands of names takes seconds
        pairs = set(pairwise(name))
        candidates = heapq.nlargest(
            _CANDIDATES, names, key=lambda other: _similarity(pairs, set(pairwise(other)))
        )
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.4) or names[:3]
    return f"nearest: {', '.join(map(repr, close))}" if close else "there are none"


def with_nearest(names: Sequence[object], known: Collection[str]) -> str:
    """The first few of some unknown `names`, each with the most similar of the `known` ones."""
    shown = [f"{name!r} ({nearest(str(name), known)})" for name in names[:MOST]]
    return listed([*shown, *map(str, names[MOST:])], "; ")


def _similarity(one: set[tuple[str, str]], other: set[tuple[str, str]]) -> float:
    """The share of pairs of letters that two names have in common."""
    return len(one & other) / (len(one) + len(other) or 1)


def _follow(
    model: nn.Module, owners: Iterable[str]
) -> tuple[nn.Module, list[tuple[dict[str, Any], str]], nn.Module | None] | None:
    """The module that the names `owners` lead to, as for `Location`; None if there is none."""
    edges: list[tuple[dict[str, Any], str]] = []
    module = model
    fsdp_module = module if is_fsdp_module(module) else None
    for owner in owners:
        edges.append((module._modules, owner))
        child = _entry(module._modules, owner)
        if child is None:
            return None
        module = child
        while (key := _wrapped_key(module)) is not None:
            edges.append((module._modules, key))
            module = _child(module, key)
        fsdp_module = module if is_fsdp_module(module) else fsdp_module
    return module, edges, fsdp_module


def _wrapped_key(module: nn.Module) -> str | None:
    """The key of the module inside a known wrapper; None if `module` is not a known wrapper."""
    for home, name, key in _WRAPPERS:
        wrapper = getattr(sys.modules.get(home), name, None)
        if wrapper is not None and isinstance(module, wrapper):
            return key
    return None


def _child(module: nn.Module, key: str) -> nn.Module:
    child = module._modules[key]
    assert child is not None
    return child


def _walk(
    module: nn.Module, prefix: str, visited: set[nn.Module], fsdp_module: nn.Module | None
) -> Iterator[tuple[str, nn.Parameter]]:
    if module in visited:
        return
    visited.add(module)
    fsdp_module = module if is_fsdp_module(module) else fsdp_module
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, sharded_original(fsdp_module, parameter)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(unwrap(child), f"{prefix}{name}.", visited, fsdp_module)


def _entry(registry: Any, key: str) -> Any:
    """`registry.get(key)`, which the registries of a scripted module lack."""
    return registry[key] if key in registry else None  # noqa: SIM401
