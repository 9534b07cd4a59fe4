"""What was learned, bound to the parameters that have its names now.

The state knows names; a penalty needs tensors. Between two training steps nearly always nothing
has changed, so names are resolved once and only checked from then on. When something has changed,
the state follows, or the change is refused by name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ewc._checks import check_materialised
from ewc._summary import Summary, measure
from ewc.fisher import Squares
from ewc.model.live import LiveParameters
from ewc.model.names import find, is_parametrized
from ewc.processes.layout import Groups, is_sharded, local, shard_groups
from ewc.processes.reductions import differentiable_sum_over, is_first_rank
from ewc.quadratic.checkpoint import State
from ewc.quadratic.penalty import Penalty, expression
from ewc.quadratic.quadratic import Quadratic, covered, fits

# The curvature that the penalty has for a parameter: of its name and what is known of it.
Precision = Callable[[str, Quadratic], Tensor]


@dataclass(frozen=True)
class _Part:
    """Parameters that are spread over the same processes, and their share of the penalty.

    Attributes:
        groups: Over which values are summed; none if every process holds all.
        members: The places of these parameters among all.
        penalty: Their penalty, of what this process holds of them.
    """

    groups: Groups
    members: list[int]
    penalty: Penalty


class Binding:
    """A state and the parameters that have its names.

    Args:
        model: The unwrapped model; the state must fit it (`check_fit`).
        state: What was learned.
        precision: The curvature of the penalty.

    Attributes:
        state: The same, on the parameters' devices, in no less than their dtypes, and sharded as
            they are.
    """

    def __init__(self, model: nn.Module, state: State, precision: Precision) -> None:
        self._live = LiveParameters(model, state.quadratics)
        parameters = self._live.parameters
        quadratics = {
            name: known.beside(parameter)
            for (name, known), parameter in zip(state.quadratics.items(), parameters, strict=True)
        }
        self.state = replace(state, quadratics=quadratics)
        self._anchors = [known.anchor for known in quadratics.values()]
        # Where not all of a parameter is protected, or not all of it is here.
        self._partial = [
            place
            for place, (parameter, anchor) in enumerate(zip(parameters, self._anchors, strict=True))
            if parameter.shape != anchor.shape or is_sharded(parameter)
        ]
        self._precisions = {name: precision(name, known) for name, known in quadratics.items()}
        precisions = list(self._precisions.values())
        constants = [known.constant for known in quadratics.values()]
        members: dict[Groups, list[int]] = {}
        for place, parameter in enumerate(parameters):
            members.setdefault(shard_groups(parameter), []).append(place)
        self._parts = [
            _Part(
                groups,
                places,
                Penalty(
                    [local(parameters[place]) for place in places],
                    [local(precisions[place]) for place in places],
                    [local(self._anchors[place]) for place in places],
                    sum(constants[place] for place in places) if is_first_rank(groups) else 0.0,
                ),
            )
            for groups, places in members.items()
        ]

    def holds(self, state: State) -> bool:
        """Whether this is still the binding of `state` to the model as it is."""
        return self.state is state and self._live.is_current()

    def penalty(self, strength: float) -> Tensor:
        """The penalty at the parameters' present values."""
        thetas: list[Tensor] = [*self._live.parameters]
        for place in self._partial:
            thetas[place] = local(covered(thetas[place], self._anchors[place]))
        return _added(
            [
                differentiable_sum_over(
                    part.penalty([thetas[place] for place in part.members], strength), part.groups
                )
                for part in self._parts
            ]
        )

    def summary(self, squares: Squares) -> Summary:
        """What there is to say after a consolidation that collected `squares`."""
        return Summary(
            n_tasks=self.state.n_tasks,
            samples=squares.samples,
            parameters=measure(self._precisions),
            paths=dict(squares.paths),
            reasons=dict(squares.reasons),
        )


def traced_penalty(model: nn.Module, state: State, precision: Precision, strength: float) -> Tensor:
    """The penalty for `torch.compile`: names resolved by plain code, which its guards can follow.

    Raises:
        ValueError: A parameter is gone or has changed its shape.
    """
    members: dict[Groups, tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]] = {}
    for name, known in state.quadratics.items():
        parameter = find(model, name)
        if parameter is None or not fits(known.anchor.shape, parameter.shape):
            raise ValueError(f"{name!r} is gone or has changed its shape.")
        part = members.setdefault(shard_groups(parameter), ([], [], [], []))
        part[0].append(local(covered(parameter, known.anchor)))
        part[1].append(local(precision(name, known)))
        part[2].append(local(known.anchor))
        part[3].append(known.constant)
    return _added(
        [
            differentiable_sum_over(
                expression(
                    thetas,
                    precisions,
                    anchors,
                    sum(constants) if is_first_rank(groups) else 0.0,
                    strength,
                ),
                groups,
            )
            for groups, (thetas, precisions, anchors, constants) in members.items()
        ]
    )


def _added(values: list[Tensor]) -> Tensor:
    """The sum of scalars, on the first one's device."""
    value = values[0]
    for other in values[1:]:
        value = value + other.to(value.device)
    return value


def check_fit(model: nn.Module, state: State, chosen: Iterable[str]) -> None:
    """Refuse a model that the names or shapes do not fit any more.

    Args:
        model: The unwrapped model.
        state: What was learned.
        chosen: Names that must be there even if nothing is known of them yet.

    Raises:
        ValueError: Parameters are gone, parametrized, or of another shape; all are listed. Or one
            has no values, so that the state would be lost if it followed.
    """
    problems = {}
    found = {name: find(model, name) for name in [*state.quadratics, *chosen]}
    check_materialised((name, one) for name, one in found.items() if one is not None)
    for name, parameter in found.items():
        known = state.quadratics.get(name)
        if parameter is None:
            problems[name] = "has been parametrized" if is_parametrized(model, name) else "is gone"
        elif known is not None and not fits(known.anchor.shape, parameter.shape):
            problems[name] = (
                f"has changed its shape from {tuple(known.anchor.shape)} to "
                f"{tuple(parameter.shape)}"
            )
        elif known is not None and is_sharded(parameter) and known.anchor.shape != parameter.shape:
            problems[name] = "has grown and is sharded, which does not go together yet"
    if problems:
        raise ValueError(
            "Protected parameters must keep their names and shapes (they may grow along "
            "dimension 0): "
            + "; ".join(f"{name!r} {what}" for name, what in problems.items())
            + f". To release them: forget({', '.join(map(repr, problems))})."
        )
