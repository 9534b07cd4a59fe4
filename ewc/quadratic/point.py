"""The point at which the penalty is evaluated, if it is not the model's own parameters.

A hypernetwork makes the parameters of another model; an adapter adds `scale * B @ A` to weights
that stay as they are. Both are tensors with a graph of their own, which the penalty continues.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ewc.model.names import find, named_parameters, with_nearest
from ewc.processes.layout import with_layout_of

Point = Mapping[str, Tensor]
"""Tensors in the place of the parameters that a state has under these names."""


def checked_point(at: Any, model: nn.Module, protected: Mapping[str, nn.Parameter]) -> Point:
    """The argument `at` of a penalty, on the devices of the parameters and sharded as they are.

    A tensor that is not sharded, for a parameter that is, must be the same on all processes.

    Args:
        at: As users write it; None for the model's own parameters.
        model: The unwrapped model.
        protected: The parameters that have a term in the penalty, by the names of their terms.
            Tensors for others change nothing.

    Raises:
        TypeError: `at` is no mapping, or a value is no tensor.
        ValueError: A name is not in the model, a tensor has another shape or dtype than its
            parameter may have, is sparse or has no data, or one parameter is given two tensors by
            two of its names; all problems are listed.
    """
    if at is None:
        return {}
    if not isinstance(at, Mapping):
        raise TypeError(
            f"at must be a mapping from names of parameters to tensors; found {type(at).__name__}."
        )
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    unknown: list[object] = []
    problems = []
    for name, value in at.items():
        parameter = protected.get(name)
        if parameter is None and isinstance(name, str):
            parameter = find(model, name)
        if parameter is None:
            unknown.append(name)
        elif not isinstance(value, Tensor):
            problems.append(f"{name!r} is a {type(value).__name__}")
        elif not _has_entries(value, parameter):
            problems.append(f"{name!r} has no entries that can be read: it is {_kind(value)}")
        elif value.shape != parameter.shape:
            problems.append(
                f"{name!r} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
            )
        elif not _has_usable_dtype(value, parameter):
            problems.append(f"{name!r} has dtype {value.dtype}, the parameter {parameter.dtype}")
        elif at[first.setdefault(id(parameter), name)] is not value:
            problems.append(f"{first[id(parameter)]!r} and {name!r} are one parameter")
        else:
            found[name] = _like(value, parameter)
    if unknown:
        problems.append(f"no parameter is named {with_nearest(unknown, named_parameters(model))}")
    if problems:
        raise ValueError(
            "at must have tensors with the names and shapes of the model's parameters; found that "
            f"{'; '.join(problems)}. Fix: take names from the property fisher, without the "
            "prefixes of wrappers, and leave out buffers."
        )
    if all(name in protected for name in found):
        return found
    names = {id(parameter): name for name, parameter in protected.items()}
    pairs = ((names.get(id(find(model, name)), name), value) for name, value in found.items())
    return {name: value for name, value in pairs if name in protected}


def _has_entries(value: Tensor, parameter: nn.Parameter) -> bool:
    """Whether a tensor has entries in the places where the parameter has them."""
    is_dense = value.layout is torch.strided and not value.is_nested
    return is_dense and (parameter.is_meta or not value.is_meta)


def _has_usable_dtype(value: Tensor, parameter: nn.Parameter) -> bool:
    if value.is_complex():
        return parameter.is_complex()
    return value.is_floating_point() and value.element_size() > 1  # no arithmetic in 8 bits


def _kind(value: Tensor) -> str:
    if value.is_nested:
        return "nested"
    return "on the meta device" if value.is_meta else f"not dense ({value.layout})"


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """`value` on the parameter's device and sharded as it is, differentiable."""
    value = value.to(parameter.device)
    if parameter.is_complex():
        value = value.to(parameter.dtype)
    return with_layout_of(value, parameter)
