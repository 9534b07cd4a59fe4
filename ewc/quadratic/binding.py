"""A state, bound to the parameters that have its names now.

The state has names; a penalty needs tensors. The model rarely changes between two training steps,
so the names are resolved once, and each step only checks that they still lead to the same
parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ewc.model.live import LiveParameters
from ewc.model.names import find
from ewc.processes.layout import Groups, is_sharded, local, same_layout, shard_groups
from ewc.processes.reductions import differentiable_sum_over, is_first_rank
from ewc.quadratic.penalty import Penalty, expression, result_dtype
from ewc.quadratic.point import Point, checked_point
from ewc.quadratic.quadratic import Quadratic, fits, protected_rows
from ewc.quadratic.state import State

Precision = Callable[[str, Quadratic], Tensor]
"""The curvature of the penalty for a parameter, given its name and its quadratic."""

_Traced = tuple[list[Tensor], list[Tensor], list[Tensor], list[float], list[Tensor]]
"""Of a term: thetas, precisions, anchors, constants, and the parameters that they belong to."""


@dataclass(frozen=True)
class _Term:
    """The term of the penalty for parameters that are sharded over the same groups.

    Attributes:
        groups: The groups over which the term is summed; none if the parameters are not sharded.
        indices: The positions of these parameters among all.
        penalty: The penalty of their local parts.
    """

    groups: Groups
    indices: list[int]
    penalty: Penalty


class Binding:
    """A state and the parameters that have its names.

    Args:
        model: The unwrapped model; it must fit the state (`check_fit`).
        state: What was consolidated.
        precision: The curvature of the penalty.

    Attributes:
        state: The state on the parameters' devices, at least as wide, and sharded as they are.
        precisions: The curvature of the penalty for each parameter, by name.
        live: The parameters.
    """

    def __init__(self, model: nn.Module, state: State, precision: Precision) -> None:
        self.live = LiveParameters(model, state.quadratics)
        parameters = self.live.parameters
        quadratics = {
            name: quadratic.like(parameter)
            for (name, quadratic), parameter in zip(
                state.quadratics.items(), parameters, strict=True
            )
        }
        self.state = replace(state, quadratics=quadratics)
        self.precisions = {name: precision(name, each) for name, each in quadratics.items()}
        self._anchors = [quadratic.anchor for quadratic in quadratics.values()]
        # Parameters that have grown or are sharded: the penalty takes only a part of them.
        self._partial = [
            index
            for index, (parameter, anchor) in enumerate(zip(parameters, self._anchors, strict=True))
            if parameter.shape != anchor.shape or is_sharded(parameter)
        ]
        precisions = list(self.precisions.values())
        constants = [quadratic.constant for quadratic in quadratics.values()]
        members: dict[Groups, list[int]] = {}
        for index, parameter in enumerate(parameters):
            members.setdefault(shard_groups(parameter), []).append(index)
        self._terms = [
            _Term(
                groups,
                indices,
                Penalty(
                    [local(parameters[index]) for index in indices],
                    [local(precisions[index]) for index in indices],
                    [local(self._anchors[index]) for index in indices],
                    sum(constants[index] for index in indices) if is_first_rank(groups) else 0.0,
                ),
            )
            for groups, indices in members.items()
        ]

    def is_current(self, state: State) -> bool:
        """Whether this still binds `state` to the model as it is."""
        return self.state is state and self.live.is_current()

    def penalty(self, strength: float, at: Point) -> Tensor:
        """The penalty at the parameters' present values, but for those that `at` replaces."""
        thetas: list[Tensor] = [*self.live.parameters]
        if at:
            thetas = [at.get(n, theta) for n, theta in zip(self.live.names, thetas, strict=True)]
        for index in self._partial:
            thetas[index] = local(protected_rows(thetas[index], self._anchors[index]))
        return _sum(
            [
                differentiable_sum_over(
                    term.penalty([thetas[index] for index in term.indices], strength), term.groups
                )
                for term in self._terms
            ]
        )


def traced_penalty(
    model: nn.Module, state: State, precision: Precision, strength: float, at: Any
) -> Tensor:
    """The penalty for `torch.compile`: plain code resolves the names, and guards can follow it.

    Args:
        model: The unwrapped model.
        state: What was consolidated.
        precision: The curvature of the penalty.
        strength: lambda.
        at: As for `checked_point`.

    Raises:
        TypeError: As for `checked_point`.
        ValueError: A parameter is gone or has changed its shape; or as for `checked_point`.
    """
    if torch.compiler.is_compiling() and _any_resharded(model, state):
        untraced: Any = _untraced_penalty
        value: Tensor = untraced(model, state, precision, strength, at)
        return value
    protected = {}
    for name, quadratic in state.quadratics.items():
        parameter = find(model, name)
        if parameter is None or not fits(quadratic.anchor.shape, parameter.shape):
            raise ValueError(
                "Protected parameters must keep their names and shapes; found that "
                f"{name!r} is gone or has changed its shape."
            )
        protected[name] = parameter
    point = checked_point(at, model, protected)
    members: dict[Groups, _Traced] = {}
    for name, parameter in protected.items():
        quadratic = state.quadratics[name]
        term = members.setdefault(shard_groups(parameter), ([], [], [], [], []))
        term[0].append(local(protected_rows(point.get(name, parameter), quadratic.anchor)))
        term[1].append(local(precision(name, quadratic)))
        term[2].append(local(quadratic.anchor))
        term[3].append(quadratic.constant)
        term[4].append(parameter)
    values = []
    for groups, (thetas, precisions, anchors, constants, parameters) in members.items():
        constant = 0.0
        if is_first_rank(groups):
            for each in constants:  # the compiler of PyTorch 2.6 cannot restart after a `sum`
                constant = constant + each
        dtype = result_dtype(parameters)  # whatever the dtype of the point
        value = expression(thetas, precisions, anchors, constant, strength, dtype)
        values.append(differentiable_sum_over(value, groups))
    return _sum(values)


def _any_resharded(model: nn.Module, state: State) -> bool:
    """Whether `fully_shard` has left parameters sharded in another way after a forward.

    Only its own state, which cannot be traced, knows the originals then.
    """
    found = [(find(model, name), each.anchor) for name, each in state.quadratics.items()]
    return any(
        is_sharded(one) and not same_layout(one, other) for one, other in found if one is not None
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _untraced_penalty(
    model: nn.Module, state: State, precision: Precision, strength: float, at: Any
) -> Tensor:
    return traced_penalty(model, state, precision, strength, at)


def _sum(values: list[Tensor]) -> Tensor:
    """The sum of scalars, on the device of the first."""
    value = values[0]
    for other in values[1:]:
        value = value + other.to(value.device)
    return value
