"""Compares sums of squares of two methods."""

from collections.abc import Mapping

import torch
from torch import Tensor


def largest(sums: Mapping[str, Tensor]) -> list[float]:
    """The largest entry of each sum."""
    return [float(each.max()) if each.numel() else 0.0 for each in sums.values()]


def differing(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], scales: list[float]
) -> set[str]:
    """The names whose sums differ by more than rounding, in half precision too, explains.

    A gradient that is zero but for rounding is small against the largest of all.

    Args:
        found: Sums by name.
        expected: What they should be.
        scales: For each of `expected`, its largest entry.
    """
    names = set()
    for (name, right), scale in zip(expected.items(), scales, strict=True):
        noise = (100 * torch.finfo(right.dtype).eps) ** 2 * max(scales)
        if bool(((found[name] - right).abs() > 0.05 * scale + noise).any()):
            names.add(name)
    return names
