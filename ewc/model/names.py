"""Names of parameters, and the parameters that have them now.

A name has to mean the same in a plain, a compiled and a DDP model, or state saved from one would
not load into another; and it has to be followed, because users replace heads, wrap layers and
move models. Wrappers are recognised by their type: editing strings would also take `module.` off
a model that has a child of that name.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import nn

from ewc.processes.layout import is_fsdp_module, sharded_original

# Where a wrapper's class is defined, its name, and the child that holds the module inside. A class
# whose module was never imported has no instances: looking it up there imports nothing.
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

_layout = attrgetter("dtype", "shape", "device")


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside any number of known wrappers."""
    while (key := _inner_key(module)) is not None:
        inner = module._modules[key]
        assert inner is not None
        module = inner
    return module


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical names: those of `module.named_parameters()` with every known wrapper taken off.

    Tied parameters appear once, under their first name.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in _walk(unwrap(module), "", set(), None):
        found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def find(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that has the canonical `name` in the unwrapped `model` now, if any.

    Also finds a tied parameter by its other names.
    """
    place = _place(model, name)
    return None if place is None else place.parameter


def is_parametrized(model: nn.Module, name: str) -> bool:
    """Whether `name` is gone because a parametrization was registered on it."""
    owner, dot, last = name.rpartition(".")
    inside = f"{owner}{dot}parametrizations.{last}."
    return any(other.startswith(inside) for other in named_parameters(model))


def in_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    """`names`, each once, in the order of the model's canonical names; others at the end."""
    rank = {name: index for index, name in enumerate(named_parameters(model))}
    return sorted(dict.fromkeys(names), key=lambda name: rank.get(name, len(rank)))


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add to an error about an unknown `name`: the nearest of the `known` ones."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return f"nearest: {', '.join(map(repr, close))}" if close else "there are none"


def select(
    model: nn.Module, parameters: Iterable[str | tuple[str, nn.Parameter]]
) -> tuple[str, ...]:
    """Resolve what a user handed as `parameters` to canonical names, in canonical order.

    Args:
        model: The model as the user has it, perhaps wrapped.
        parameters: Names, or `(name, parameter)` pairs. A pair is resolved by its parameter, so
            its name may carry the prefixes of wrappers.

    Raises:
        TypeError: `parameters`, or one of its items, is of another kind.
        ValueError: A name is unknown, a parameter is of another model or has another name, or is
            frozen. All of them are listed.
    """
    if isinstance(parameters, (str, bytes)) or not isinstance(parameters, Iterable):
        raise TypeError(
            "parameters must be None or an iterable of names, or of (name, parameter) pairs; "
            f"found {parameters!r}. For one parameter, pass a list of one name."
        )
    canonical = named_parameters(model)
    name_of = {id(parameter): name for name, parameter in canonical.items()}
    # The names that the user sees on the outer model, prefixes, ties and all.
    outer = dict(model.named_parameters(remove_duplicate=False))
    inner = unwrap(model)

    chosen: list[str] = []
    problems: list[str] = []
    for item in parameters:
        name, parameter = _read_item(item)
        known = outer.get(name)
        if known is None:
            known = find(inner, name)
        if parameter is None:
            parameter = known
            if parameter is None:
                problems.append(f"no parameter is named {name!r} ({nearest(name, canonical)})")
                continue
        elif id(parameter) not in name_of:
            problems.append(f"{name!r} is paired with a tensor that is no parameter of the model")
            continue
        elif known is not None and known is not parameter:
            problems.append(
                f"{name!r} is paired with the parameter that is named {name_of[id(parameter)]!r}"
            )
            continue
        if not parameter.requires_grad:
            problems.append(f"{name!r} is frozen (requires_grad is False)")
            continue
        chosen.append(name_of[id(parameter)])
    if problems:
        raise ValueError(
            "parameters must be trainable parameters of the model: " + "; ".join(problems) + "."
        )
    wanted = set(chosen)
    return tuple(name for name in canonical if name in wanted)


def check_initialised(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse parameters that the next forward would initialise.

    Raises:
        ValueError: One is lazy.
    """
    for name, parameter in parameters:
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"Parameters must be initialised; {name!r} is lazy. Run a forward first."
            )


def check_materialised(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse parameters that have no values.

    Raises:
        ValueError: One is lazy (uninitialised) or on the meta device.
    """
    for name, parameter in parameters:
        check_initialised([(name, parameter)])
        if parameter.is_meta:
            raise ValueError(
                f"Parameters must hold values; {name!r} is on the meta device. Materialise first, "
                "for instance with model.to_empty(device=...) and load_state_dict."
            )


class Live:
    """The parameters that have certain names now, and whether that is still so.

    Resolving names walks the model in Python; a training step cannot afford it. What it can
    afford is to look at the dictionary entries on the way, and at shape, dtype and device.

    Args:
        model: The unwrapped model.
        names: Names that `find` finds.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        edges: dict[tuple[int, str], tuple[dict[str, Any], str, object]] = {}
        self.parameters: list[nn.Parameter] = []
        self._places: list[_Place] = []
        for name in names:
            place = _place(model, name)
            if place is None:
                raise ValueError(
                    "Modules and parameters must have names without a dot; found no way to "
                    f"{name!r}. Rename the one that has a dot, or leave it out."
                )
            for registry, key in place.edges:
                edges[id(registry), key] = (registry, key, registry[key])
            self.parameters.append(place.parameter)
            self._places.append(place)
        self._registries = [place.registry for place in self._places]
        self._names = [place.key for place in self._places]
        self._edges = list(edges.values())
        self._layouts = list(map(_layout, self.parameters))

    def holds(self) -> bool:
        """Whether nothing on the paths was replaced, and no parameter changed its layout."""
        for registry, key, expected in self._edges:
            if key not in registry or registry[key] is not expected:
                return False
        # No loops in Python where all is well: for a thousand small parameters they would cost
        # more than the arithmetic.
        try:
            found = map(getitem, self._registries, self._names)
            unmoved = all(map(is_, found, self.parameters))
        except KeyError:
            return False
        if not unmoved and not all(map(_Place.holds, self._places, self.parameters)):
            return False
        return list(map(_layout, self.parameters)) == self._layouts


def _inner_key(module: nn.Module) -> str | None:
    for home, name, key in _WRAPPERS:
        kind = getattr(sys.modules.get(home), name, None)
        if kind is not None and isinstance(module, kind):
            return key
    return None


def _walk(
    module: nn.Module, prefix: str, visited: set[nn.Module], keeper: nn.Module | None
) -> Iterator[tuple[str, nn.Parameter]]:
    if module in visited:
        return
    visited.add(module)
    keeper = module if is_fsdp_module(module) else keeper
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, sharded_original(keeper, parameter)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(unwrap(child), f"{prefix}{name}.", visited, keeper)


@dataclass
class _Place:
    """Where a parameter is in a model.

    Attributes:
        edges: The dictionary entries on the way from the model to the module that has it.
        registry: That module's parameters.
        key: The parameter's name there.
        keeper: The innermost module around it that `fully_shard` was applied to, if any.
    """

    edges: list[tuple[dict[str, Any], str]]
    registry: dict[str, Any]
    key: str
    keeper: nn.Module | None

    @property
    def parameter(self) -> nn.Parameter:
        """What is there now; the sharded one, also while it is held whole."""
        return sharded_original(self.keeper, self.registry[self.key])

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether `parameter` is still there."""
        found = _entry(self.registry, self.key)
        if found is parameter:
            return True
        return found is not None and sharded_original(self.keeper, found) is parameter


def _place(model: nn.Module, name: str) -> _Place | None:
    """The way from `model` down to a parameter, through wrappers; None if it is gone."""
    *owners, last = name.split(".")
    edges: list[tuple[dict[str, Any], str]] = []
    module = model
    keeper = module if is_fsdp_module(module) else None
    for owner in owners:
        edges.append((module._modules, owner))
        child = _entry(module._modules, owner)
        if child is None:
            return None
        module = child
        while (key := _inner_key(module)) is not None:
            edges.append((module._modules, key))
            inner = module._modules[key]
            assert inner is not None
            module = inner
        keeper = module if is_fsdp_module(module) else keeper
    if _entry(module._parameters, last) is None:
        return None
    return _Place(edges, module._parameters, last, keeper)


def _entry(registry: Any, key: str) -> Any:
    """`registry.get(key)`, which the registries of a scripted module lack."""
    return registry[key] if key in registry else None  # noqa: SIM401


def _read_item(item: object) -> tuple[str, torch.Tensor | None]:
    if isinstance(item, str):
        return item, None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        name, parameter = item
        if isinstance(name, str) and isinstance(parameter, torch.Tensor):
            return name, parameter
    raise TypeError(
        "Each of parameters must be a name or a (name, parameter) pair; "
        f"found {type(item).__name__}. Pass names, or items of model.named_parameters()."
    )
