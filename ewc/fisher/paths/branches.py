"""Values that a model reads out of tensors, to branch on them.

Inside `vmap` all samples run through the same code. A value may be read only if it is the same for
all samples; otherwise the batch is divided into groups of samples for which it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

READS = {
    getattr(torch.Tensor, name)
    for name in ("__bool__", "__contains__", "__float__", "__index__", "__int__", "item", "tolist")
}
"""The functions that read values out of a tensor."""


class DivergentBranches(Exception):  # noqa: N818 - a condition, not an error: as StopIteration
    """The model reads values that differ between the samples of a batch.

    Attributes:
        groups: The indices of the samples, grouped by the values.
    """

    def __init__(
        self,
        groups: list[list[int]],
        reason: str = "the model reads values out of a tensor that differ between samples",
    ) -> None:
        super().__init__(reason)
        self.groups = groups


def read(func: Callable[..., Any], values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Read a value that all samples share.

    Args:
        func: One of `READS`, or another function of the tensor.
        values: `[N, *shape]`, what each sample holds.
        args: Further arguments of `func`.
        kwargs: Further keyword arguments of `func`.

    Raises:
        DivergentBranches: The samples differ.
    """
    compared = values.bool() if func is torch.Tensor.__bool__ else values
    groups: dict[tuple[Any, ...], list[int]] = {}
    for sample, row in enumerate(compared.reshape(len(values), -1).tolist()):
        groups.setdefault(tuple(row), []).append(sample)
    if len(groups) > 1:
        raise DivergentBranches(list(groups.values()))
    return func(values[0], *args, **kwargs)
