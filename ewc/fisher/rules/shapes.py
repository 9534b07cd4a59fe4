"""Functions that take only the shape or the type of a tensor of samples."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ewc.fisher.rules.registry import NotCovered, decomposition


def _define(
    function: Callable[..., Tensor], method: Callable[[Tensor, Sequence[int]], Tensor]
) -> None:
    """Register `x.view_as(y)` or another method like it as `x.view(y.shape)`."""

    @decomposition(function)
    def change(input: Tensor, other: Tensor) -> Tensor:
        return method(input, other.shape)


_define(torch.Tensor.expand_as, torch.Tensor.expand)
_define(torch.Tensor.view_as, torch.Tensor.view)
_define(torch.Tensor.reshape_as, torch.Tensor.reshape)


@decomposition(torch.Tensor.to, torch.Tensor.type_as)
def to(input: Tensor, other: object) -> Tensor:
    """`input`, in the dtype and on the device of `other`."""
    if not isinstance(other, Tensor):
        raise NotCovered
    return input.to(other.device, other.dtype)
