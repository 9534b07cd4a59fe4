"""Scalars that lie on a device, read by the host."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def read(scalars: Sequence[Tensor]) -> list[Any]:
    """The values of 0-d tensors, on any devices; the host waits once, not once for each.

    Args:
        scalars: Tensors of shape `[]`, all of them boolean or all of them real.
    """
    if not scalars:
        return []
    device = scalars[0].device
    values: list[Any] = torch.stack([each.to(device) for each in scalars]).tolist()
    return values
