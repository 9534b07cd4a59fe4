"""Scalars on a device: made of tensors, and read by the host."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def read(scalars: Sequence[Tensor]) -> list[Any]:
    """The values of 0-d tensors, on any devices; the host waits once, not once for each.

    Args:
        scalars: Tensors of shape `[]`, all of them boolean or all of them numbers.
    """
    if not scalars:
        return []
    device = scalars[0].device
    values: list[Any] = torch.stack([each.to(device) for each in scalars]).tolist()
    return values


def largest_entry(tensor: Tensor) -> Tensor:
    """The largest entry of a real tensor whose entries are `>= 0`, shape `[]`; 0 if it has none."""
    return tensor.max() if tensor.numel() else tensor.sum()
