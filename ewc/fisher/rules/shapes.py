"""Functions that take only the shape or the type of a tensor of samples."""

import torch
from torch import Tensor

from ewc.fisher.rules.registry import NotCovered, decomposition


@decomposition(torch.Tensor.expand_as)
def expand_as(input: Tensor, other: Tensor) -> Tensor:
    """`input`, expanded to the shape of `other`."""
    return input.expand(other.shape)


@decomposition(torch.Tensor.view_as)
def view_as(input: Tensor, other: Tensor) -> Tensor:
    """`input`, viewed in the shape of `other`."""
    return input.view(other.shape)


@decomposition(torch.Tensor.reshape_as)
def reshape_as(input: Tensor, other: Tensor) -> Tensor:
    """`input`, reshaped to the shape of `other`."""
    return input.reshape(other.shape)


@decomposition(torch.Tensor.type_as)
def type_as(input: Tensor, tensor: Tensor) -> Tensor:
    """`input`, in the dtype of `tensor`."""
    return input.to(tensor.dtype)


@decomposition(torch.Tensor.to)
def to(input: Tensor, other: object) -> Tensor:
    """`input`, in the dtype and on the device of `other`."""
    if not isinstance(other, Tensor):
        raise NotCovered
    return input.to(other.device, other.dtype)
