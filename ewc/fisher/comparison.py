"""Compares sums of squares of two methods."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ewc._scalars import largest_entry, read


def largest(sums: Mapping[str, Tensor]) -> list[float]:
    """The largest entry of each sum."""
    return read(list(map(largest_entry, sums.values())))


def differing(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    scales: list[float],
    *,
    is_half: bool,
) -> set[str]:
    """The names whose sums differ by more than rounding.

    The bound for each sum is a share of its largest entry: a wrong rule is off by as much as the
    sum itself. A gradient that is zero but for rounding is compared with the largest entry of all
    sums.

    Args:
        found: Sums by name, overwritten: no new memory has to be filled.
        expected: What they should be.
        scales: For each of `expected`, its largest entry.
        is_half: Whether the model computes in half precision.
    """
    beyond = []
    share = 0.2 if is_half else 0.05
    for (name, right), scale in zip(expected.items(), scales, strict=True):
        rounding = (
            8 * torch.finfo(torch.bfloat16).eps if is_half else 100 * torch.finfo(right.dtype).eps
        )
        bound = share * scale + rounding**2 * max(scales)
        beyond.append(_farthest(found[name].sub_(right)) > bound)
    return {name for name, one in zip(expected, read(beyond), strict=True) if one}


def _farthest(differences: Tensor) -> Tensor:
    """The largest modulus, in a fraction of the time of a comparison of all."""
    if not differences.numel():
        return differences.sum()
    low, high = differences.aminmax()
    return torch.maximum(-low, high)
