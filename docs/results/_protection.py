"""An `EWC` with a Fisher that was computed elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from _study import Strength
from torch import Tensor, nn

from ewc import EWC, Likelihood


def protected(
    model: nn.Module, likelihood: Likelihood, fisher: Mapping[str, Tensor], strength: Strength
) -> EWC:
    """One that protects the model's present parameters, as if they were one task's solution.

    Args:
        model: The model.
        likelihood: Of later consolidations.
        fisher: By name, for every parameter that is protected.
        strength: lambda, or `"auto"`.
    """
    regularizer = EWC(model, likelihood, strength=strength, parameters=list(fisher))
    state = regularizer.state_dict()  # a template: zero Fisher, present parameters as anchor
    rows = dict.fromkeys(fisher, 0)
    regularizer.load_state_dict({**state, "n_tasks": 1, "fisher": dict(fisher), "free_rows": rows})
    return regularizer
