"""Extras: what follows the targets in a batch."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ewc.data.structures import children, describe, is_scalar
from ewc.errors import InvalidBatch
from ewc.likelihoods.faults import match_dims


def read_masks(
    extras: Sequence[Any], shapes: Callable[[], Sequence[Sequence[int]]], name: str
) -> list[Tensor]:
    """The masks among the extras of a batch.

    Each boolean tensor of the positions' shape is a mask. Ids, lengths and task labels (1-D
    integers), strings and other objects without tensors are ignored, and so is what all samples
    share (numbers, tensors of no dimension). Anything else may be meant to change the likelihood.

    Args:
        extras: What follows the targets.
        shapes: Gives the shapes that a mask may have.
        name: The name of the likelihood, for the error.

    Raises:
        InvalidBatch: There are other extras; the message lists them.
    """
    masks, wrong = [], []
    for index, extra in enumerate(extras, start=1):
        if isinstance(extra, Tensor) and extra.dtype == torch.bool and extra.dim() > 0:
            if list(extra.shape) in map(list, shapes()):
                masks.append(extra)
                continue
        elif is_scalar(extra) or _is_ignored(extra):
            continue
        wrong.append(f"{describe(extra)} as rest[{index}]")
    if wrong:
        allowed = " or ".join(str(list(shape)) for shape in shapes())
        raise InvalidBatch(
            f"what follows the targets must be a boolean mask {allowed}, or what {name} ignores: "
            "1-D integers (ids, lengths, task labels) and strings; found "
            f"{', '.join(wrong)}. Fix: leave out what nobody reads, ((x, y) for x, y, *_ in "
            "loader); put what the model reads among its inputs, ((x, extra), y); make a mask "
            "boolean, mask.bool(); for weights, a likelihood of your own, such as Custom(lambda "
            f"outputs, targets, weights: weights * {name}().nll(outputs, targets))."
        )
    return masks


def restrict(weights: Tensor | None, mask: Tensor) -> Tensor:
    """Weights or a mask `[n]` or `[n, *positions]`, and 0 or False where `mask` is False.

    Args:
        weights: The weights; None: all are 1.
        mask: `[n]` or `[n, *positions]`, boolean.
    """
    if weights is None:
        return mask
    weights, mask = match_dims(weights, mask), match_dims(mask, weights)
    return weights & mask if weights.dtype == torch.bool else torch.where(mask, weights, 0)


def _is_ignored(extra: Any) -> bool:
    """Whether a value, or an entry of a list, cannot be a mask or the weight of a sample."""
    if isinstance(extra, Tensor):
        is_real = extra.is_floating_point() or extra.is_complex() or extra.dtype == torch.bool
        return extra.dim() == 0 or (extra.dim() == 1 and not is_real)
    items = children(extra)
    if items is not None:
        return all(map(_is_ignored, items))
    if is_scalar(extra) and not isinstance(extra, (str, bytes)) and extra is not None:
        return isinstance(extra, Integral) and not isinstance(extra, bool)
    return True
