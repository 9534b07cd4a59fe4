"""The form that a state has in a checkpoint.

A checkpoint outlives the code that wrote it, and is read for models that have changed since. So it
has a version, and all of it is validated before anything is loaded. A fresh object writes an entry
for every parameter: `torch.distributed.checkpoint` reads into the tensors of such a template, and
would read nothing into an empty one.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ewc._checks import listed
from ewc.errors import NothingProtectedWarning
from ewc.model.names import find, in_order
from ewc.processes.agreement import agree
from ewc.processes.layout import described, full_tensor
from ewc.processes.ranks import Ranks
from ewc.quadratic.quadratic import Quadratic, curvature_dtype, n_rows, snapshot
from ewc.quadratic.state import State
from ewc.quadratic.validation import VERSION, Reader
from ewc.quadratic.values import plain_name


def dump(
    state: State,
    *,
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    configuration: Mapping[str, Any],
    full: bool,
    ranks: Ranks,
) -> dict[str, Any]:
    """The state as nested dicts of plain values and tensors, which are copies.

    Every parameter that has a quadratic, or is trainable, has entries of its present shape. Rows
    without a quadratic (all rows in a fresh object, the new ones of a head that has grown) have a
    Fisher of 0, their present values as anchor, and are counted in `free_rows`.

    Args:
        state: What was consolidated.
        model: The unwrapped model.
        trainable: The parameters that a consolidation would collect now.
        configuration: The options of the object that give the numbers their meaning.
        full: Full tensors instead of sharded ones.
        ranks: The processes that gather them together, if parameters are sharded.

    Raises:
        ValueError: They would not gather the same tensors.
    """
    quadratics = {}
    free_rows = {}
    for name in map(plain_name, in_order(model, [*state.quadratics, *trainable])):
        parameter = find(model, name)
        if parameter is None:
            continue
        quadratic = state.quadratics.get(name)
        present = snapshot(parameter)
        if quadratic is None:
            zero = torch.zeros_like(present, dtype=curvature_dtype(parameter))
            quadratics[name] = Quadratic(zero, present)
            free_rows[name] = n_rows(parameter)
        else:
            quadratic = quadratic.like(parameter)
            quadratics[name] = quadratic.grown(present.to(quadratic.anchor.dtype)).clone()
            free_rows[name] = n_rows(parameter) - n_rows(quadratic.fisher)
    fisher = {name: one.fisher for name, one in quadratics.items()}
    anchor = {name: one.anchor for name, one in quadratics.items()}
    if full:
        agree(ranks, _described(quadratics))
        with ranks.exchange("the state's tensors"):
            fisher = {name: full_tensor(each) for name, each in fisher.items()}
            anchor = {name: full_tensor(each) for name, each in anchor.items()}
    ranks.finish()
    return {
        "version": VERSION,
        **configuration,
        "n_tasks": state.n_tasks,
        "parameters": list(quadratics),
        "fisher": fisher,
        "anchor": anchor,
        "constant": {name: one.constant for name, one in quadratics.items()},
        "free_rows": free_rows,
    }


def restore(
    saved: object,
    *,
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    configuration: Mapping[str, Any],
    ranks: Ranks,
) -> State:
    """Read what `dump` wrote, onto the devices of the model's parameters.

    The caller ends the block of `ranks` with `finish`.

    Args:
        saved: What was loaded from the checkpoint.
        model: The unwrapped model.
        trainable: The parameters that a consolidation would collect now.
        configuration: The options of the object, which must be those of the state.
        ranks: The processes that load together, if parameters are sharded.

    Raises:
        TypeError: `saved` is not a dict.
        ValueError: It does not fit the object or the model; all problems are listed.

    Warns:
        UserWarning: Once, if the model has parts that the state does not cover.
        NothingProtectedWarning: Instead, if the state protects nothing at all.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(
            "A state must be a dict, as state_dict() returns it; found "
            f"{type(saved).__name__}. Fix: pass what state_dict() returned."
        )
    reader = Reader(saved, model, configuration)
    found, n_tasks = reader.read()
    if reader.problems:
        raise ValueError(
            "The state must fit this object and its model; nothing was loaded. Found:\n"
            + "\n".join(f"  - {problem}" for problem in reader.problems)
        )
    agree(ranks, {"n_tasks": n_tasks, **_described(found)})
    with ranks.exchange("the state's tensors"):
        quadratics = {name: one.like(reader.parameters[name]) for name, one in found.items()}
    uncovered = [
        *reader.grown,
        *(f"{name!r} is not in the state" for name in trainable if name not in reader.names),
    ]
    if not quadratics:
        warnings.warn(
            f"This state protects nothing (n_tasks={n_tasks}): it was saved before the first "
            "consolidation, or after all parameters were released. The penalty is 0 until the "
            "next consolidation.",
            NothingProtectedWarning,
            stacklevel=3,
        )
    elif uncovered:
        warnings.warn(
            "The model has parts that this state does not cover; they are free until the next "
            f"consolidation: {listed(uncovered, '; ')}.",
            stacklevel=3,
        )
    ordered = in_order(model, quadratics)
    return State({name: quadratics[name] for name in ordered}, n_tasks)


def _described(quadratics: Mapping[str, Quadratic]) -> dict[str, str]:
    """What must be the same on all processes that gather or distribute the tensors of a state."""
    return {
        f"the state of {name!r}": ", ".join(map(described, (one.fisher, one.anchor)))
        for name, one in quadratics.items()
    }
