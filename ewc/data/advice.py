"""Code for errors about batches: what to yield, or the `forward` to write."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ewc.data.structures import children, holds_tensors, is_scalar

LABELS = "labels"
"""The key of the targets in a batch that is a mapping."""

_TARGETS = {"label", "target", "targets", "y", "ys", "class", "classes", "output", "outputs"}

_REQUIRED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """The arguments of a function; None if they are not known, as of compiled and scripted ones."""
    if isinstance(function, nn.Module):  # a loss of torch.nn
        function = function.forward
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def accepts(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> bool:
    """Whether a function takes these arguments; then a TypeError came from inside it."""
    known = signature(function)
    if known is None:
        return True
    try:
        known.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True


def forward_template(raw: Any, model: nn.Module | None = None) -> str:
    """The code of a `forward` that passes as many inputs of this batch as the model requires."""
    take, call = "        ...  # take the model's inputs out of batch\n", "model(inputs)"
    if isinstance(raw, Mapping) and raw:
        keys = [key for key in raw if key != LABELS]
        take, call = "", _call(keys or list(raw), model)
    elif isinstance(raw, (list, tuple)) and len(raw) > 1:
        names = ["inputs", "targets", *(f"extra_{i}" for i in range(1, len(raw) - 1))]
        take = f"        {', '.join(names)} = batch\n"
        inputs = ["inputs"]
        required = _required(model)
        if isinstance(raw[0], (list, tuple)) and holds_tensors(raw[0]):
            inputs = [f"inputs[{i}]" for i in range(min(len(raw[0]), len(required) or 1))]
        missing = len(required) - len(inputs)
        if missing > 0:
            extras = names[2:][-missing:]
            unknown = required[len(inputs) + len(extras) :]
            take += "".join(f"        {name} = ...  # not in the batch?\n" for name in unknown)
            inputs += extras + unknown
        call = f"model({', '.join(inputs)})"
    return f"    def forward(model, batch):\n{take}        return {call}"


def missing_labels(raw: Mapping[Any, Any], model: nn.Module, batch_dim: int) -> str:
    """The message about a mapping without labels: its keys, and two ways to read it."""
    keys = list(raw)
    rule = (
        f"a batch that is a mapping must hold the targets as {LABELS!r}; found the keys "
        f"{', '.join(map(repr, keys))}. Fix: "
    )
    if len(keys) == 1:
        return f"{rule}yield the targets, too, as (b[{keys[0]!r}], targets)."
    named = [key for key in keys if str(key).lower() in _TARGETS]
    target = named[0] if named else keys[-1]
    inputs = [key for key in keys if key is not target]
    along = f", batch_dim={batch_dim}" if batch_dim else ""
    return (
        f"{rule}yield tuples, (({_inputs(inputs, model)}, {_item('b', target)}) for b in "
        "loader); or let forward return all that the likelihood takes:\n"
        "    def forward(model, batch):\n"
        f"        return {_call(inputs, model)}, {_item('batch', target)}\n"
        f"    EWC(model, Custom(lambda out: likelihood.nll(*out){along}), forward=forward)"
    )


def conversion(raw: Any) -> str:
    """The expression of a batch `b` whose arrays are tensors."""
    return _converted(raw, "b")


def is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy or of a library like it."""
    if isinstance(value, Tensor) or is_scalar(value):
        return False
    return all(hasattr(value, name) for name in ("__array__", "dtype", "tolist"))


def _converted(value: Any, name: str) -> str:
    if is_array(value):
        kind = str(value.dtype)
        if not kind.startswith(("float", "int", "uint", "bool", "complex")):
            return f"{name}.tolist()"
        tensor = f"torch.as_tensor({name})"
        return f"{tensor}.float()" if kind == "float64" else tensor
    items = children(value)
    if not items:
        return name
    if isinstance(value, Mapping):
        pairs = zip(value, items, strict=True)
        inside = (f"{key!r}: {_converted(item, _item(name, key))}" for key, item in pairs)
        return f"{{{', '.join(inside)}}}"
    inside = (_converted(item, f"{name}[{i}]") for i, item in enumerate(items))
    return f"({', '.join(inside)}{',' if len(items) == 1 else ''})"


def _item(name: str, key: Any) -> str:
    return f'{name}["{key}"]' if isinstance(key, str) else f"{name}[{key!r}]"


def _required(model: nn.Module | None) -> list[str]:
    """The names of the inputs without which the model's `forward` cannot be called."""
    known = None if model is None else signature(model.forward)
    parameters = [] if known is None else known.parameters.values()
    return [p.name for p in parameters if p.kind in _REQUIRED and p.default is p.empty]


def _by_name(keys: list[Any], model: nn.Module | None) -> list[Any]:
    """The keys that are names of arguments of the model's `forward`, if these are enough."""
    known = None if model is None else signature(model.forward)
    if model is None or known is None:
        return []
    named = [key for key in keys if key in known.parameters]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.parameters.values()):
        named = [key for key in keys if isinstance(key, str)]
    return named if accepts(model.forward, **dict.fromkeys(named)) else []


def _items(name: str, keys: list[Any], model: nn.Module | None) -> list[str]:
    """The expressions of the model's inputs by position, in a batch of this name."""
    required = max(1, len(_required(model)))
    items = [_item(name, key) for key in keys[:required]]
    return items + ["..."] * (required - len(items))


def _inputs(keys: list[Any], model: nn.Module) -> str:
    """The expression of the model's inputs in a batch `b`, as a tuple's first entry."""
    named = _by_name(keys, model)
    if named:
        pairs = [f"{key!r}: {_item('b', key)}" for key in named]
        return f"{{{', '.join(pairs)}}}"
    items = _items("b", keys, model)
    return items[0] if len(items) == 1 else f"({', '.join(items)})"


def _call(keys: list[Any], model: nn.Module | None) -> str:
    """The call of the model on a batch `batch`."""
    named = _by_name(keys, model)
    items = [f"{key}={_item('batch', key)}" for key in named] or _items("batch", keys, model)
    return f"model({', '.join(items)})"
