"""What was learned, bound to the parameters that have its names now.

The state knows names; a penalty needs tensors. Between two training steps nearly always nothing
has changed, so names are resolved once and only checked from then on. When something has changed,
the state follows, or the change is refused by name.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor, nn

from ewc._parameters import Live, find, is_parametrized
from ewc._penalty import Penalty, expression
from ewc._quadratic import Quadratic, covered, fits
from ewc._state import State
from ewc._summary import Summary
from ewc.fisher import Squares

# The curvature that the penalty has for a parameter: of its name and what is known of it.
Precision = Callable[[str, Quadratic], Tensor]


class Binding:
    """A state and the parameters that have its names.

    Args:
        model: The unwrapped model; the state must fit it (`check_fit`).
        state: What was learned.
        precision: The curvature of the penalty.

    Attributes:
        state: The same, on the parameters' devices, in no less than their dtypes.
    """

    def __init__(self, model: nn.Module, state: State, precision: Precision) -> None:
        self._live = Live(model, state.quadratics)
        parameters = self._live.parameters
        quadratics = {
            name: known.beside(parameter)
            for (name, known), parameter in zip(state.quadratics.items(), parameters, strict=True)
        }
        self.state = replace(state, quadratics=quadratics)
        self._penalty = Penalty(
            parameters,
            [precision(name, known) for name, known in quadratics.items()],
            [known.anchor for known in quadratics.values()],
            sum(known.constant for known in quadratics.values()),
        )

    def holds(self, state: State) -> bool:
        """Whether this is still the binding of `state` to the model as it is."""
        return self.state is state and self._live.holds()

    def penalty(self, strength: float) -> Tensor:
        """The penalty at the parameters' present values."""
        pairs = zip(self._live.parameters, self._penalty.anchors, strict=True)
        return self._penalty([covered(parameter, anchor) for parameter, anchor in pairs], strength)

    def summary(self, squares: Squares) -> Summary:
        """What there is to say after a consolidation that collected `squares`."""
        precisions = [one for one in self._penalty.precisions if one.numel()]
        return Summary(
            task=self.state.n_tasks,
            samples=squares.samples,
            trace=sum(one.sum().item() for one in precisions),
            largest=max(one.max().item() for one in precisions),
            paths=dict(squares.paths),
            reasons=dict(squares.reasons),
        )


def traced_penalty(model: nn.Module, state: State, precision: Precision, strength: float) -> Tensor:
    """The penalty for `torch.compile`: names resolved by plain code, which its guards can follow.

    Raises:
        ValueError: A parameter is gone or has changed its shape.
    """
    thetas, precisions, anchors = [], [], []
    constant = 0.0
    for name, known in state.quadratics.items():
        parameter = find(model, name)
        if parameter is None or not fits(known.anchor.shape, parameter.shape):
            raise ValueError(f"{name!r} is gone or has changed its shape.")
        thetas.append(covered(parameter, known.anchor))
        precisions.append(precision(name, known))
        anchors.append(known.anchor)
        constant = constant + known.constant
    return expression(thetas, precisions, anchors, constant, strength)


def check_fit(model: nn.Module, state: State, chosen: Iterable[str]) -> None:
    """Refuse a model that the names or shapes do not fit any more.

    Args:
        model: The unwrapped model.
        state: What was learned.
        chosen: Names that must be there even if nothing is known of them yet.

    Raises:
        ValueError: Parameters are gone, parametrized, or of another shape; all are listed.
    """
    problems = {}
    for name in dict.fromkeys([*state.quadratics, *chosen]):
        parameter = find(model, name)
        known = state.quadratics.get(name)
        if parameter is None:
            problems[name] = "has been parametrized" if is_parametrized(model, name) else "is gone"
        elif known is not None and not fits(known.anchor.shape, parameter.shape):
            problems[name] = (
                f"has changed its shape from {tuple(known.anchor.shape)} to "
                f"{tuple(parameter.shape)}"
            )
    if problems:
        raise ValueError(
            "Protected parameters must keep their names and shapes (they may grow along "
            "dimension 0): "
            + "; ".join(f"{name!r} {what}" for name, what in problems.items())
            + f". To release them: forget({', '.join(map(repr, problems))})."
        )
