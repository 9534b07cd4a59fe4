"""Sums and maxima of tensors over process groups."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ewc.processes.layout import Groups


def max_over(values: Tensor, groups: Groups) -> Tensor:
    """The elementwise maximum over these groups; `values` itself if there are none."""
    return _all_reduce(values, groups, dist.ReduceOp.MAX)


def sum_over(values: Tensor, groups: Groups) -> Tensor:
    """The elementwise sum over these groups; `values` itself if there are none."""
    return _all_reduce(values, groups, dist.ReduceOp.SUM)


def differentiable_sum_over(value: Tensor, groups: Groups) -> Tensor:
    """`sum_over`, differentiable; `value` itself if there are no groups.

    Every process must call backward on the same function of the sum. The gradient of its own
    summand is then the gradient of the sum, and backward needs no communication.
    """
    if not groups:
        return value
    result: Tensor = _Sum.apply(value, groups)  # type: ignore[no-untyped-call]
    return result


def is_first_rank(groups: Groups) -> bool:
    """Whether this process contributes what a sum over these groups must count only once."""
    return all(dist.get_rank(group) == 0 for group in groups)


def communication_device(device: torch.device | str, groups: Groups) -> torch.device:
    """`device`, or one from which all of these groups can send."""
    device = torch.device(device)
    for group in groups:
        backends = dist.get_backend_config(group)
        kinds = [pair.partition(":")[0] for pair in backends.split(",")]
        if device.type not in kinds:
            return torch.device(kinds[-1], torch.accelerator.current_device_index())
    return device


def _all_reduce(values: Tensor, groups: Groups, operation: Any) -> Tensor:
    if not groups:
        return values
    device = values.device
    values = values.to(communication_device(device, groups), copy=True)
    for group in groups:
        dist.all_reduce(values, operation, group=group)
    return values.to(device)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, groups: Groups) -> Tensor:
        return sum_over(value, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
