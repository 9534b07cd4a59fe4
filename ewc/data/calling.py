"""How a model is called on a batch, and what the likelihood gets from the batch."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from torch import nn

from ewc.data.structures import describe, holds_tensors
from ewc.errors import InvalidBatch

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""`forward(model, batch) -> outputs`, for the loader's batch or any part of it, also in `vmap`."""

_LABELS = "labels"


def apply(
    model: nn.Module, raw: Any, forward: Forward | None = None, *, whole: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """Run a model on a batch.

    Args:
        model: The model.
        raw: The batch in the loader's structure.
        forward: `forward(model, batch) -> outputs`. If it is None, the model is called:
            `model(*inputs)` for a list or tuple of inputs; `model(**inputs)` for a mapping, and
            for a batch that is itself a mapping, without its `labels`; else `model(inputs)`, also
            for a list of one object per sample.
        whole: Whether a list of inputs holds one entry per sample, and is passed as it is.

    Returns:
        The outputs, or their `.logits` if they have any, and `rest`: what follows the inputs.

    Raises:
        InvalidBatch: The inputs do not match the arguments of the model's `forward`.
    """
    inputs, rest = split_inputs(raw)
    if forward is not None:
        outputs = forward(model, raw)
    else:
        arguments: tuple[Any, ...] = (inputs,)
        keywords: Mapping[str, Any] = {}
        if isinstance(inputs, Mapping):
            arguments, keywords = (), inputs
        elif isinstance(inputs, (list, tuple)) and holds_tensors(inputs) and not whole:
            arguments = tuple(inputs)
        try:
            outputs = model(*arguments, **keywords)
        except TypeError as error:
            if _accepts(model, arguments, keywords):
                raise
            raise InvalidBatch(
                "without a forward, the inputs of a batch must match the arguments of "
                f"{type(model).__name__}.forward{_signature(model)}; found the batch "
                f"{describe(raw)}. Fix: yield (inputs, *rest) with matching inputs, or pass a "
                f"forward:\n{forward_template(raw)}"
            ) from error
    logits = getattr(outputs, "logits", None)
    return (outputs if logits is None else logits), rest


def split_inputs(raw: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split a batch into the model's inputs and `rest`, which the likelihood is called with."""
    if isinstance(raw, Mapping):
        inputs = {key: value for key, value in raw.items() if key != _LABELS}
        return inputs, ((raw[_LABELS],) if _LABELS in raw else ())
    if isinstance(raw, (list, tuple)):
        return raw[0], tuple(raw[1:])
    return raw, ()


def forward_template(raw: Any) -> str:
    """The code of a `forward` that reads this batch, for an error that asks for one."""
    take = "        ...  # take the model's inputs out of batch\n"
    call = "        return model(inputs)"
    if isinstance(raw, Mapping) and raw:
        first = next(iter(cast("Mapping[str, Any]", raw)))
        take, call = "", f"        return model(batch[{first!r}])"
    elif isinstance(raw, (list, tuple)) and len(raw) > 1:
        take = f"        inputs, {', '.join(f'rest_{i}' for i in range(1, len(raw)))} = batch\n"
    return f"    def forward(model, batch):\n{take}{call}"


def _signature(model: nn.Module) -> inspect.Signature | str:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled and scripted forwards may have none
        return "(...)"


def _accepts(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether the model's `forward` takes these arguments; then a TypeError came from inside it."""
    signature = _signature(model)
    if isinstance(signature, str):
        return True
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True


def check_forward(forward: Forward | None) -> None:
    """Refuse a `forward` that cannot be called.

    Raises:
        TypeError: It is neither None nor a function.
    """
    if forward is not None and not callable(forward):
        raise TypeError(
            "forward must be a function forward(model, batch) -> outputs; found "
            f"{type(forward).__name__}."
        )
