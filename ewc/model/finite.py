"""Which values of a model are not finite."""

import cmath
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ewc._scalars import read
from ewc.model.names import named_parameters
from ewc.processes.layout import local

AFTER_DIVERGENCE = (
    "if training has diverged, go back to a checkpoint, and train with a smaller learning rate or "
    "strength: plain gradient descent on the penalty is stable only while lr * strength * largest "
    "< 2, where largest is the largest curvature of the penalty (consolidate returns it: "
    "summary.largest)."
)
"""What to do about parameters that are not finite."""


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those with an entry that is NaN or infinite; all are read at once.

    A sum is finite only if all entries are, and takes a fraction of the time of looking at each.
    Where a sum is not, it may have overflowed: then the entries are looked at.
    """
    parts = {name: local(each.detach()) for name, each in tensors.items()}
    summed = [name for name, part in parts.items() if _has_sum(part)]
    sums = read([parts[name].sum() for name in summed])
    clear = {name for name, one in zip(summed, sums, strict=True) if cmath.isfinite(one)}
    unclear = [name for name in parts if name not in clear]
    finite = read([parts[name].isfinite().all() for name in unclear])
    return [name for name, one in zip(unclear, finite, strict=True) if not one]


def _has_sum(part: Tensor) -> bool:
    """Whether entries can be summed: narrow dtypes have no sum, or one that overflows soon."""
    return part.layout is torch.strided and part.element_size() >= 4


def diverged(model: nn.Module) -> list[str]:
    """The names of parameters that are not finite, and of buffers with NaN entries.

    Infinite buffers are common, as masks. Without a collective: of the parts on this process.
    """
    parameters = non_finite(named_parameters(model))
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and not buffer.is_meta
    }
    nan = read([local(each).isnan().any() for each in buffers.values()])
    return [*parameters, *(name for name, one in zip(buffers, nan, strict=True) if one)]
