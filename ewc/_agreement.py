"""What all processes of a consolidation must have the same."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ewc._consolidation import Task
from ewc._settings import Settings
from ewc.model.names import named_parameters
from ewc.processes.agreement import agree
from ewc.processes.ranks import Ranks
from ewc.quadratic.state import State


def agree_on(
    task: Task,
    ranks: Ranks,
    model: nn.Module,
    state: State,
    parameters: Mapping[str, nn.Parameter],
    settings: Settings,
    options: Mapping[str, Any],
) -> None:
    """Check that all processes collect the same parameters, from the same model and state.

    Args:
        task: The data of each process, and the options for it.
        ranks: The processes.
        model: The unwrapped model; its parameters are compared by their values.
        state: What was consolidated.
        parameters: The parameters to collect.
        settings: The options of this and all other tasks.
        options: Further ones by name, or dicts of tensors.

    Raises:
        ValueError: Something differs between processes.
    """
    if not ranks.is_distributed:
        return
    tables = {key: one for key, one in options.items() if isinstance(one, dict)}
    values = {
        **{f"the shape of {name!r}": tuple(p.shape) for name, p in parameters.items()},
        **{key: one for key, one in options.items() if key not in tables},
        **{f"the constant of {name!r}": q.constant for name, q in state.quadratics.items()},
        "n_tasks": state.n_tasks,
        "max_samples": settings.max_samples,
        "dataset_size": task.dataset_size,
        "weight": task.weight,
        "likelihood": type(task.likelihood).__qualname__,
    }
    tensors = {
        **{f"{key}[{name!r}]": t for key, one in tables.items() for name, t in one.items()},
        **{f"the Fisher of {name!r}": q.fisher for name, q in state.quadratics.items()},
        **{f"the anchor of {name!r}": q.anchor for name, q in state.quadratics.items()},
        **{f"the values of {name!r}": p for name, p in named_parameters(model).items()},
    }
    agree(ranks, values, tensors)
