"""What consolidations leave behind, and whether a model still fits it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ewc._checks import check_materialised, listed, listed_names
from ewc.model.finite import AFTER_DIVERGENCE, non_finite
from ewc.model.names import find, is_parametrized
from ewc.processes.layout import is_sharded
from ewc.quadratic.quadratic import Quadratic, fits


@dataclass(frozen=True)
class State:
    """What an object has consolidated. It is replaced, never changed: all or nothing.

    Attributes:
        quadratics: By canonical name, in canonical order.
        n_tasks: How many consolidations there were.
        warned: The names for which a `ZeroFisherWarning` was issued.
        warned_slow: Whether a `SlowPathWarning` was issued.
        warned_replaced: The names for which a `ReplacedParameterWarning` was issued.
    """

    quadratics: Mapping[str, Quadratic] = field(default_factory=dict)
    n_tasks: int = 0
    warned: frozenset[str] = frozenset()
    warned_slow: bool = False
    warned_replaced: frozenset[str] = frozenset()

    def warned_like(self, other: "State") -> "State":
        """This state, in an object that has issued the warnings of the `other`."""
        return replace(
            self,
            warned=other.warned,
            warned_slow=other.warned_slow,
            warned_replaced=other.warned_replaced,
        )

    def without(self, names: Collection[str]) -> "State":
        """This state, without the quadratics of these names."""
        kept = {name: each for name, each in self.quadratics.items() if name not in names}
        return replace(self, quadratics=kept)

    def quadratics_like(self, model: nn.Module) -> Iterator[tuple[str, Quadratic]]:
        """The names and quadratics, on the parameters' devices, at least as wide, sharded as they.

        Those of parameters that are gone, or have no values, are as they were.
        """
        for name, quadratic in self.quadratics.items():
            parameter = find(model, name)
            if parameter is not None and not parameter.is_meta:
                quadratic = quadratic.like(parameter)
            yield name, quadratic


def check_fit(model: nn.Module, state: State, chosen: Iterable[str]) -> None:
    """Refuse a model whose parameters no longer have the names or shapes in the state.

    Args:
        model: The unwrapped model.
        state: What was consolidated.
        chosen: Names that the model must have even if they have no quadratic yet.

    Raises:
        ValueError: Parameters are gone, parametrized, or of another shape; all of them are listed.
            Or parameters have no values, and the state would lose its own if it followed them.
    """
    found = {name: find(model, name) for name in [*state.quadratics, *chosen]}
    check_materialised((name, one) for name, one in found.items() if one is not None)
    problems = {}
    for name, parameter in found.items():
        if parameter is None:
            problems[name] = "has been parametrized" if is_parametrized(model, name) else "is gone"
            continue
        if name not in state.quadratics:
            continue
        shape = state.quadratics[name].anchor.shape
        if not fits(shape, parameter.shape):
            problems[name] = (
                f"has changed its shape from {tuple(shape)} to {tuple(parameter.shape)}"
            )
        elif is_sharded(parameter) and shape != parameter.shape:
            problems[name] = "has grown and is sharded, which is not supported"
    if problems:
        raise ValueError(
            "Protected parameters must keep their names and shapes (they may grow along "
            "dimension 0); found that "
            + listed((f"{name!r} {what}" for name, what in problems.items()), "; ")
            + f". Fix: undo the change, or release them: forget({listed_names(problems)})."
        )


def check_finite(quadratics: Mapping[str, Quadratic], reduction: str) -> None:
    """Refuse quadratics that no finite penalty follows from.

    Raises:
        ValueError: A Fisher or an anchor is not finite; the message names them.
    """
    overflowed = non_finite({name: q.fisher for name, q in quadratics.items()})
    if overflowed:
        raise ValueError(
            "The Fisher must be finite; found that it overflows for "
            f"{listed_names(overflowed)}. Fix: check the scale of the likelihood, and weight"
            + ("." if reduction == "mean" else ', or use reduction="mean".')
        )
    refuse_non_finite({name: q.anchor for name, q in quadratics.items()})


def refuse_non_finite(values: Mapping[str, Tensor]) -> None:
    """Refuse protected parameters, or anchors, that are not finite.

    Raises:
        ValueError: An entry is NaN or infinite; the message names the parameters.
    """
    names = non_finite(values)
    if names:
        raise ValueError(
            "Protected parameters must be finite; found NaN or infinite entries in "
            f"{listed_names(names)}. Fix: {AFTER_DIVERGENCE} If the entries are so on purpose, "
            "exclude the parameters, with requires_grad_(False) or the argument parameters."
        )
