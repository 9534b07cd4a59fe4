"""How a model is called on a raw batch, and what the likelihood gets of it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from torch import nn

from ewc.data.structures import describe, holds_tensors
from ewc.errors import InvalidBatch

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""`forward(model, batch) -> outputs`, the whole batch in hand."""

_LABELS = "labels"


def apply(
    model: nn.Module, raw: Any, forward: Forward | None = None
) -> tuple[Any, tuple[Any, ...]]:
    """Run a model on a raw batch.

    Args:
        model: The model.
        raw: A batch, or `Batch.raw`, or what `Batch.of_one` returned.
        forward: `forward(model, batch) -> outputs`. Without it: `model(inputs)`; `model(*inputs)`
            for a list or tuple; `model(**inputs)` for a mapping, and for a batch that is itself a
            mapping, without its `labels`. A list of one object per sample is one argument.

    Returns:
        The outputs, or their `.logits` where they have them, and what follows the inputs.

    Raises:
        InvalidBatch: The batch has another number of inputs than the model's `forward` takes.
    """
    inputs, rest = split_inputs(raw)
    if forward is not None:
        outputs = forward(model, raw)
    else:
        arguments: tuple[Any, ...] = (inputs,)
        keywords: Mapping[str, Any] = {}
        if isinstance(inputs, Mapping):
            arguments, keywords = (), inputs
        elif isinstance(inputs, (list, tuple)) and holds_tensors(inputs):
            arguments = tuple(inputs)
        try:
            outputs = model(*arguments, **keywords)
        except TypeError as error:
            if _accepts(model, arguments, keywords):
                raise
            raise InvalidBatch(
                "without a forward, the inputs of a batch are the arguments of "
                f"{type(model).__name__}.forward{_signature(model)}; found the batch "
                f"{describe(raw)}. Mend: yield (inputs, *rest) with inputs to match, or pass a "
                f"forward:\n{forward_to_write(raw)}"
            ) from error
    logits = getattr(outputs, "logits", None)
    return (outputs if logits is None else logits), rest


def split_inputs(raw: Any) -> tuple[Any, tuple[Any, ...]]:
    """The inputs of a raw batch, and the rest: what the likelihood is called with."""
    if isinstance(raw, Mapping):
        inputs = {key: value for key, value in raw.items() if key != _LABELS}
        return inputs, ((raw[_LABELS],) if _LABELS in raw else ())
    if isinstance(raw, (list, tuple)):
        return raw[0], tuple(raw[1:])
    return raw, ()


def forward_to_write(raw: Any) -> str:
    """A template of the `forward` that reads this batch."""
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
    """Whether the model can be called like that, so that a TypeError came from inside it."""
    signature = _signature(model)
    if isinstance(signature, str):
        return True
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True
