"""How the quadratics of successive tasks are merged into one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ewc.model.names import in_order
from ewc.quadratic.quadratic import Quadratic, raised, snapshot


class Merging:
    """A sum over tasks, each around its own anchor: that of `EWC`. `OnlineEWC` has another."""

    def configuration(self) -> dict[str, Any]:
        """The options that give the numbers in a state their meaning, by the user's names."""
        return {}

    def updated(
        self, old: Quadratic | None, fisher: Tensor, anchor: Tensor
    ) -> tuple[Quadratic, Tensor | None]:
        """The quadratic of a parameter that a task has collected.

        Args:
            old: The quadratic before the task, if there was one.
            fisher: The Fisher of the task, of the parameter's shape; its memory may be used.
            anchor: The parameter's values at the end of the task; likewise.

        Returns:
            The quadratic, and by how much its constant must still be increased, if at all.
        """
        return (Quadratic(fisher, anchor), None) if old is None else old.plus(fisher, anchor)

    def not_collected(self, old: Quadratic) -> Quadratic:
        """The quadratic of a parameter that a task has not collected."""
        return old

    def precision(self, name: str, quadratic: Quadratic) -> Tensor:
        """The curvature of the penalty for a parameter, before `strength`."""
        return quadratic.fisher

    def precisions(self, quadratics: Mapping[str, Quadratic]) -> dict[str, Tensor]:
        """The curvature of the penalty by name, before `strength`."""
        return {name: self.precision(name, each) for name, each in quadratics.items()}

    def next_quadratics(
        self,
        model: nn.Module,
        quadratics: Mapping[str, Quadratic],
        parameters: Mapping[str, nn.Parameter],
        fisher: Mapping[str, Tensor],
    ) -> dict[str, Quadratic]:
        """The quadratics after one more task, in canonical order.

        Args:
            model: The unwrapped model.
            quadratics: The quadratics before the task.
            parameters: The parameters that the task has collected; their values are its anchor.
            fisher: The Fisher of the task, for each of `parameters`; its memory may be used.
        """
        found: dict[str, Quadratic] = {}
        rises: dict[str, Tensor] = {}
        for name in in_order(model, [*quadratics, *parameters]):
            old = quadratics.get(name)
            if name in parameters:
                parameter = parameters[name]
                old = None if old is None else old.like(parameter)
                found[name], rise = self.updated(old, fisher[name], snapshot(parameter))
                if rise is not None:
                    rises[name] = rise
            elif old is not None:
                found[name] = self.not_collected(old)
        return raised(found, rises)
