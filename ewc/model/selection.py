"""Which parameters of a model are protected: the argument `parameters`, and what it selects now."""

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn

from ewc._checks import check_initialised, check_materialised, listed
from ewc.model.names import find, named_parameters, unwrap, with_nearest
from ewc.processes.layout import refuse_unsupported


def select(
    model: nn.Module, parameters: Iterable[str | tuple[str, nn.Parameter]]
) -> tuple[str, ...]:
    """Resolve the argument `parameters` to distinct canonical names, in canonical order.

    Args:
        model: The user's model, wrapped or not.
        parameters: Names, or `(name, parameter)` pairs. A pair is resolved by its parameter, so
            its name may have the prefixes of wrappers.

    Raises:
        TypeError: `parameters` or one of its items has another type.
        ValueError: A name is unknown, a parameter belongs to another model, has another name, or
            is frozen. The message lists every such item.
    """
    if isinstance(parameters, (str, bytes)) or not isinstance(parameters, Iterable):
        raise TypeError(
            "parameters must be None or an iterable of names, or of (name, parameter) pairs; "
            f"found {parameters!r}. Fix: for one parameter, pass a list of one name."
        )
    canonical = named_parameters(model)
    name_of = {id(parameter): name for name, parameter in canonical.items()}
    # The names of the wrapped model: with prefixes, and with each name of a tied parameter.
    outer = dict(model.named_parameters(remove_duplicate=False))
    inner = unwrap(model)

    chosen: set[str] = set()
    problems: list[str] = []
    unknown: list[str] = []
    for item in parameters:
        name, parameter = _split_item(item)
        named = outer.get(name)
        if named is None:
            named = find(inner, name)
        if parameter is None:
            parameter = named
            if parameter is None:
                unknown.append(name)
                continue
        elif id(parameter) not in name_of:
            problems.append(f"{name!r} is paired with a tensor that is no parameter of the model")
            continue
        elif named is not None and named is not parameter:
            problems.append(
                f"{name!r} is paired with the parameter that is named {name_of[id(parameter)]!r}"
            )
            continue
        if not parameter.requires_grad:
            problems.append(f"{name!r} is frozen (requires_grad is False)")
            continue
        chosen.add(name_of[id(parameter)])
    if unknown or problems:
        faults = [listed(problems, "; ")] if problems else []
        if unknown:
            faults.append(f"no parameter is named {with_nearest(unknown, canonical)}")
        raise ValueError(
            f"parameters must be trainable parameters of the model; found: {'; '.join(faults)}. "
            "Fix: take names or pairs from model.named_parameters(), without the frozen ones."
        )
    return tuple(name for name in canonical if name in chosen)


def trainable(model: nn.Module, selected: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient now, by canonical name.

    Args:
        model: The unwrapped model.
        selected: The names to choose from; None for all.

    Raises:
        RuntimeError: A parameter is sharded, and PyTorch is too old for it.
    """
    candidates = named_parameters(model)
    refuse_unsupported(candidates.values())
    if selected is not None:
        found = {id(find(model, name)) for name in selected}  # some may have been tied since
        candidates = {name: p for name, p in candidates.items() if id(p) in found}
    return {name: p for name, p in candidates.items() if p.requires_grad}


def collectable(model: nn.Module, selected: Collection[str] | None) -> dict[str, nn.Parameter]:
    """`trainable`, if there are any and the model can be run.

    Raises:
        ValueError: There are none, or parameters are lazy or have no values.
    """
    parameters = trainable(model, selected)
    if not parameters:
        raise ValueError(
            "There must be a parameter to protect; found none with requires_grad among "
            f"{'those of the model' if selected is None else 'the names given'}. "
            "Fix: set requires_grad_(True) on the parameters to protect, or name others."
        )
    check_materialised(parameters.items())
    check_initialised(named_parameters(model).items())
    return parameters


def check_released(names: Sequence[object], known: Collection[str]) -> None:
    """Refuse names that `EWC.forget` cannot release.

    Raises:
        TypeError: There is no name, or one is not a string.
        ValueError: Names are not among the `known` ones; all of them are listed.
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"forget must get one or more names of parameters; found {names!r}. "
            "Fix: pass names as separate arguments."
        )
    among = dict.fromkeys(known)
    unknown = [name for name in names if isinstance(name, str) and name not in among]
    if unknown:
        raise ValueError(
            "forget must get names of protected parameters; found unknown ones: "
            f"{with_nearest(unknown, among)}. Fix: take names from the property fisher."
        )


def without(
    model: nn.Module, selected: tuple[str, ...] | None, released: Collection[str]
) -> tuple[str, ...] | None:
    """The names to choose from once `released` ones are; None for all.

    A released name that is gone from the model can never be collected again, and is dropped.
    """
    if selected is None:
        return None
    gone = {name for name in released if find(model, name) is None}
    return tuple(name for name in selected if name not in gone)


def _split_item(item: object) -> tuple[str, Tensor | None]:
    """The name and the parameter of one item of `parameters`; a bare name has no parameter."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        name, parameter = item
        if isinstance(name, str) and isinstance(parameter, Tensor):
            return name, parameter
    raise TypeError(
        "each of parameters must be a name or a (name, parameter) pair; "
        f"found {type(item).__name__}. Fix: pass names, or items of model.named_parameters()."
    )
