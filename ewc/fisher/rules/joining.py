"""Parameters put next to samples: class tokens, registers, keys and values that are learned."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ewc.fisher.gradients import Gradient, Sum
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(
    op: Operation, tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None
) -> Tensor:
    """Pieces in a row: the gradient of a piece is the slice of `g` in its place."""
    dim = dim if axis is None else axis
    samples = [None if op.is_protected(each) else op.samples(each) for each in tensors]
    n = max((len(each) for each in samples if each is not None), default=0)
    if len({each.dim() for each in tensors}) > 1:
        raise NotCovered
    pieces, start = [], 0
    starts: dict[Tensor, list[int]] = {}
    for each, given in zip(tensors, samples, strict=True):
        if given is None:
            starts.setdefault(each, []).append(start)
            given = op.value(each).expand(n, *each.shape)
        pieces.append(given)
        start += each.shape[dim]
    axis = dim if dim < 0 else dim + 1

    def piece(length: int, starts: list[int]) -> Callable[[Tensor], Gradient]:
        return lambda g: Sum(torch.stack([g.narrow(axis, at, length) for at in starts], 1))

    gradients: dict[Tensor | None, Callable[[Tensor], Gradient]] = {
        each: piece(each.shape[dim], starts[each]) for each in tensors if each in starts
    }
    return op.record(torch.cat(pieces, axis), gradients)


@decomposition(torch.stack)
def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Joined along a dimension of their own."""
    return torch.cat([each.unsqueeze(dim) for each in tensors], dim)


@decomposition(torch.Tensor.repeat)
def repeat(input: Tensor, *sizes: Any) -> Tensor:
    """Once in each dimension, as a token for a batch of one."""
    times = sizes[0] if isinstance(sizes[0], Sequence) else sizes
    if any(size != 1 for size in times):
        raise NotCovered
    return input.expand(*[1] * (len(times) - input.dim()), *input.shape)
