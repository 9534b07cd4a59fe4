"""A state bound anew, after the model has changed; and a warning about new heads under old names.

A parameter is followed by its name. A new head that takes an old name is pulled towards the old one
at once, which is seldom meant. It is told apart from what else replaces parameter objects
(conversions, loading, sharding, merged adapters) by its values, which have nothing to do with the
old ones. They are compared only when an object has been replaced, not in every step.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ewc._checks import listed_names
from ewc._scalars import read
from ewc.errors import ReplacedParameterWarning, warn
from ewc.model.live import LiveParameters
from ewc.processes.layout import local, same_layout
from ewc.quadratic.binding import Binding, Precision
from ewc.quadratic.quadratic import protected_rows
from ewc.quadratic.state import State
from ewc.quadratic.values import is_foreign

_UNRELATED = 0.1
"""The share above which values are others: 0 if nothing has changed, about 1 for a new head."""


def rebound(old: Binding | None, model: nn.Module, state: State, precision: Precision) -> Binding:
    """The state, bound to the model as it is now.

    Args:
        old: The binding before the model or the state changed, if there was one.
        model: The unwrapped model; it must fit the state.
        state: What was consolidated.
        precision: The curvature of the penalty.

    Warns:
        ReplacedParameterWarning: As for `warn_of_replaced`.
    """
    with torch.inference_mode(False), torch.no_grad():
        new = Binding(model, state, precision)
    warn_of_replaced(old, new)
    return new


def warn_of_replaced(old: Binding | None, new: Binding) -> None:
    """Warn of parameters that have replaced others of the same name, with other values.

    The state of `new` records the names.

    Warns:
        ReplacedParameterWarning: Once for each name.
    """
    if old is None:
        return
    names = [n for n in replaced_names(old.live, new.live) if n not in new.state.warned_replaced]
    if names:
        warn(
            "A new parameter under the name of a protected one is pulled towards the old values; "
            f"found that {listed_names(names)} have been replaced by parameters with other values. "
            f"Fix: if they are new, release them: forget({listed_names(names)}).",
            ReplacedParameterWarning,
        )
        warned = new.state.warned_replaced.union(names)
        new.state = replace(new.state, warned_replaced=warned)


def replaced_names(old: LiveParameters, new: LiveParameters) -> list[str]:
    """The names whose parameters are other objects, with values unrelated to the old ones.

    The parameters of one module count as one. Not among them: names that are tied to another
    parameter now; and all of them, if every parameter is another object and every module is still
    the same. Then a model was loaded or converted.
    """
    before = dict(zip(old.names, zip(old.parameters, old.locations, strict=True), strict=True))
    now = dict(zip(new.names, new.parameters, strict=True))
    name_of = {id(parameter): name for name, (parameter, _) in before.items()}
    modules: dict[int, list[str]] = {}
    are_kept = []
    for name, location in zip(new.names, new.locations, strict=True):
        if name not in before:
            continue
        was, previous = before[name]
        is_same = now[name] is was
        are_kept.append(is_same or location.registry is not previous.registry)
        tied_to = name_of.get(id(now[name]))
        if not is_same and (tied_to is None or now.get(tied_to) is not now[name]):
            modules.setdefault(id(location.registry), []).append(name)
    if not modules or (not any(are_kept) and len(modules) > 1):
        return []
    squares: list[Tensor] = []
    compared = []
    for names in modules.values():
        found = [each for n in names for each in _squares(before[n][0], now[n])]
        if found:
            squares += [sum(found[::2], torch.zeros(())), sum(found[1::2], torch.zeros(()))]
            compared.append(names)
    values = read(squares)
    return [
        name
        for names, distance, size in zip(compared, values[::2], values[1::2], strict=True)
        if distance > _UNRELATED * size
        for name in names
    ]


def _squares(old: nn.Parameter, new: nn.Parameter) -> Iterator[Tensor]:
    """The squared distance of two parameters, and the sum of their squared sizes.

    In the narrower of the two dtypes, to which one may have been converted. Nothing if they cannot
    be compared: one is not a parameter (as inside `torch.func.functional_call`), has no values any
    more, or lies on other processes.
    """
    if not (_has_values(old) and _has_values(new) and same_layout(old, new)):
        return
    rows = protected_rows(new, old)
    before, now = local(old.detach()), local(rows.detach())
    if before.shape != now.shape:
        return
    narrow = max(old.dtype, new.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    wide = torch.promote_types(narrow, torch.float32)
    before, now = before.to(now.device, narrow).to(wide), now.to(narrow).to(wide)
    yield (before - now).abs().square().sum().float().cpu()
    yield (before.abs().square().sum() + now.abs().square().sum()).float().cpu()


def _has_values(parameter: Tensor) -> bool:
    """Whether a parameter can be read: an old one may have given its memory away."""
    if not isinstance(parameter, nn.Parameter) or is_foreign(parameter) or parameter.is_meta:
        return False
    part = local(parameter.detach())
    if part.layout is not torch.strided or not (part.is_floating_point() or part.is_complex()):
        return False
    return part.numel() == 0 or part.untyped_storage().nbytes() > 0
