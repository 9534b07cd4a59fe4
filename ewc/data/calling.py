"""How a model is called on a batch, and what the likelihood gets from the batch."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from ewc.data.advice import LABELS, accepts, forward_template, signature
from ewc.data.structures import describe, holds_tensors
from ewc.errors import InvalidBatch

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""`forward(model, batch) -> outputs`, for the loader's batch or any part of it, also in `vmap`."""


def apply(
    model: nn.Module, raw: Any, forward: Forward | None = None, *, whole: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """Run a model on a batch.

    Args:
        model: The model.
        raw: The batch in the loader's structure.
        forward: `forward(model, batch) -> outputs`. If it is None, the model is called:
            `model(*inputs)` for a list or tuple of inputs; `model(**inputs)` for a mapping, and
            for a batch that is itself a mapping, without its `labels` (an encoder-decoder model
            with its `labels`, of which it makes the decoder's inputs); else `model(inputs)`, also
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
            if isinstance(raw, Mapping) and _decodes_labels(model, raw):
                keywords = raw
        elif isinstance(inputs, (list, tuple)) and holds_tensors(inputs) and not whole:
            arguments = tuple(inputs)
        try:
            outputs = model(*arguments, **keywords)
        except TypeError as error:
            if accepts(model.forward, *arguments, **keywords):
                raise
            raise InvalidBatch(
                "without a forward, the inputs of a batch must match the arguments of "
                f"{type(model).__name__}.forward{signature(model.forward) or '(...)'}; found the "
                f"batch {describe(raw)}. Fix: yield (inputs, *rest) with matching inputs, or pass "
                f"a forward:\n{forward_template(raw, model)}"
            ) from error
    logits = getattr(outputs, "logits", None)
    return (outputs if logits is None else logits), rest


def split_inputs(raw: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split a batch into the model's inputs and `rest`, which the likelihood is called with."""
    if isinstance(raw, Mapping):
        inputs = {key: value for key, value in raw.items() if key != LABELS}
        return inputs, ((raw[LABELS],) if LABELS in raw else ())
    if isinstance(raw, (list, tuple)):
        return raw[0], tuple(raw[1:])
    return raw, ()


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


def _decodes_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a model makes the inputs of its decoder from the labels, as when it is trained.

    Without them it would make something else of its encoder's inputs, or fail. Labels that are no
    tensor, as the objects in an image, are targets alone.
    """
    config = getattr(model, "config", None)
    return (
        bool(getattr(config, "is_encoder_decoder", False))
        and isinstance(batch.get(LABELS), Tensor)
        and batch.get("decoder_input_ids") is None
    )
