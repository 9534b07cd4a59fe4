"""Heads: the outputs of a model that targets refer to."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ewc.data.structures import describe
from ewc.errors import InvalidBatch


def output_indices(allowed: Iterable[int] | None) -> tuple[int, ...] | None:
    """Validate `allowed_outputs`: integers >= 0, at least one, each once.

    Raises:
        TypeError: They are not integers.
        ValueError: There are none, or some are negative or repeated.
    """
    if allowed is None:
        return None
    rule = "allowed_outputs must be the indices of a head's outputs: integers >= 0, each once"
    try:
        indices = tuple(_index(value) for value in allowed)
    except TypeError as error:
        raise TypeError(f"{rule}; found {allowed!r}. Fix: a list such as [0, 1].") from error
    if not indices:
        raise ValueError(f"{rule}; found none. Fix: pass None for all outputs.")
    negative = [index for index in indices if index < 0]
    if negative:
        raise ValueError(f"{rule}; found {abridged(negative)}. Fix: count from the first output.")
    repeated = sorted({index for index in indices if indices.count(index) > 1})
    if repeated:
        raise ValueError(f"{rule}; found {abridged(repeated)} more than once. Fix: drop copies.")
    return indices


def abridged(values: Iterable[int]) -> str:
    """The first few of some numbers, for a message."""
    listed = list(values)
    shown = ", ".join(str(value) for value in listed[:5])
    return shown if len(listed) <= 5 else f"{shown}, ... ({len(listed)} in all)"


def real_tensor(outputs: Any, name: str) -> Tensor:
    """The outputs, if they are one tensor of real numbers.

    Raises:
        InvalidBatch: They are anything else; the message names the likelihood by `name`.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise InvalidBatch(
            f"the outputs that {name} takes must be one tensor of real numbers; found "
            f"{describe(outputs)}. Fix: select or compute it in a forward:\n"
            "    def forward(model, batch):\n"
            "        return model(batch[0])[...]"
        )
    return outputs


def head_of(outputs: Tensor, allowed: tuple[int, ...] | None, dim: int) -> Tensor:
    """The allowed outputs along `dim`, in at least float32, so that the NLL keeps its precision.

    Raises:
        InvalidBatch: The model has fewer outputs.
    """
    if allowed is not None:
        available = outputs.shape[dim]
        if max(allowed) >= available:
            raise InvalidBatch(
                f"allowed_outputs must be indices of the {available} outputs, 0 to "
                f"{available - 1}; found {max(allowed)} for outputs {describe(outputs)}. Fix: "
                "change allowed_outputs, or the size of the head."
            )
        # Not blocking: a copy that waits would be another synchronisation.
        index = torch.tensor(allowed).to(outputs.device, non_blocking=True)
        outputs = outputs.index_select(dim, index)
    return outputs.float() if outputs.element_size() < 4 else outputs


def _index(value: Any) -> int:
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool):
        raise TypeError("a bool is not an index")
    return operator.index(value)
