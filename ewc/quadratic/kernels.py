"""The arithmetic of the penalty, for groups of parameters: in blocks, or as lists.

On a CPU the sum is bound by memory traffic: parameters are processed in blocks that fit into the
cache, and small ones are concatenated, so that a hundred biases cost one operation. On an
accelerator it is bound by launches: parameters of middle size are processed as lists, where one
launch serves many of them, without the second copy that concatenation takes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from typing_extensions import override


@dataclass(frozen=True)
class Limits:
    """Sizes, in elements.

    Attributes:
        small: The largest parameter that is concatenated with others, which takes a second copy.
        listed: The largest parameter that is processed in a list with others.
        block: How much is processed at once.
    """

    small: int
    listed: int
    block: int


# Three float32 blocks fit into a core's own cache. On an accelerator blocks only bound the
# workspace.
CPU = Limits(small=2**13, listed=0, block=2**16)
ACCELERATOR = Limits(small=2**16, listed=2**24, block=2**24)


class Group(ABC):
    """Parameters of one device and dtype that are processed together.

    Args:
        indices: The positions of these parameters among all thetas.
        anchors: Their anchors.
    """

    def __init__(self, indices: list[int], anchors: list[Tensor]) -> None:
        self._indices = indices
        self._anchors = anchors
        self._zero = anchors[0].new_zeros(())
        self._largest = torch.finfo(self._zero.dtype).max
        self._has_empty = any(anchor.numel() == 0 for anchor in anchors)

    def evaluate(
        self, thetas: Sequence[Tensor], strength: float, *, with_gradient: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Summands of `strength * precision * |theta - anchor|^2`, and half its gradient.

        Args:
            thetas: All thetas.
            strength: As for the penalty.
            with_gradient: Whether the gradient is returned, flat; else its memory is reused.
        """
        # PyTorch refuses a number that the dtype cannot hold, and accepts infinity.
        strength = strength if strength <= self._largest else math.inf
        own = [thetas[index] for index in self._indices]
        squares, gradient = self._evaluate(own, strength, with_gradient=with_gradient)
        return squares, gradient if with_gradient else None

    def split(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Views of a flat tensor, in the shapes of the thetas, by their positions."""
        return zip(self._indices, self._shaped(flat), strict=True)

    def _shaped(self, flat: Tensor) -> tuple[Tensor, ...]:
        views: tuple[Tensor, ...] = _unflatten_dense_tensors(flat, self._anchors)
        if self._has_empty:  # which have lost their shape before torch 2.10
            pairs = zip(views, self._anchors, strict=True)
            return tuple(view.view_as(anchor) for view, anchor in pairs)
        return views

    @abstractmethod
    def _evaluate(
        self, thetas: list[Tensor], strength: float, *, with_gradient: bool
    ) -> tuple[list[Tensor], Tensor]: ...


class Blocks(Group):
    """One flat tensor, a single parameter or several small ones, processed block by block.

    Args:
        indices: As for `Group`.
        precisions: The curvature for each theta.
        anchors: As for `Group`.
        block: How many elements are processed at once.
    """

    def __init__(
        self,
        indices: list[int],
        precisions: list[Tensor],
        anchors: list[Tensor],
        block: int,
    ) -> None:
        super().__init__(indices, anchors)
        self._block = block
        # Views of a single parameter; copies of several small ones.
        self._blocks = list(
            zip(
                torch.split(_flat(precisions), block),
                torch.split(_flat(anchors), block),
                strict=True,
            )
        )

    @override
    def _evaluate(
        self, thetas: list[Tensor], strength: float, *, with_gradient: bool
    ) -> tuple[list[Tensor], Tensor]:
        theta = _flat(thetas)
        size = min(self._block, theta.numel())
        workspace = self._zero.new_empty(size)
        flat = self._zero.new_empty(theta.numel() if with_gradient else size)
        parts = torch.split(theta, self._block)
        gradients = torch.split(flat, self._block) if with_gradient else [flat] * len(parts)
        squares = []
        for part, gradient, (precision, anchor) in zip(parts, gradients, self._blocks, strict=True):
            distance = workspace
            if part.numel() < size:  # the last part
                distance, gradient = workspace[: part.numel()], gradient[: part.numel()]
            torch.sub(part, anchor, out=distance)
            # strength * distance * precision in one operation.
            torch.addcmul(self._zero, distance, precision, value=strength, out=gradient)
            squares.append(_dot(distance, gradient))
        return squares, flat


class Lists(Group):
    """Several parameters, processed at once through views of flat memory.

    Operations on lists take few launches where the tensors are contiguous and of one dtype (a copy
    may change it), and else one for each tensor.

    Args:
        indices: As for `Group`.
        precisions: The curvature for each theta.
        anchors: As for `Group`.
    """

    def __init__(
        self,
        indices: list[int],
        precisions: list[Tensor],
        anchors: list[Tensor],
    ) -> None:
        super().__init__(indices, anchors)
        self._precisions = precisions
        self._size = sum(anchor.numel() for anchor in anchors)

    @override
    def _evaluate(
        self, thetas: list[Tensor], strength: float, *, with_gradient: bool
    ) -> tuple[list[Tensor], Tensor]:
        distance, flat = self._zero.new_empty(self._size), self._zero.new_empty(self._size)
        distances = self._shaped(distance)
        torch._foreach_copy_(distances, thetas)
        torch._foreach_sub_(distances, self._anchors)
        torch.mul(distance, strength, out=flat)
        torch._foreach_mul_(self._shaped(flat), self._precisions)
        return [_dot(distance, flat)], flat


def grouped(precisions: Sequence[Tensor], anchors: Sequence[Tensor]) -> Iterator[Group]:
    """Groups of small and of middle parameters, up to a block each; each other one is a group."""
    open_groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    open_sizes: dict[tuple[torch.device, torch.dtype, bool], int] = {}

    def group(indices: list[int], block: int, *, as_lists: bool) -> Group:
        precision, anchor = (
            [tensors[index] for index in indices] for tensors in (precisions, anchors)
        )
        if as_lists:
            return Lists(indices, precision, anchor)
        return Blocks(indices, precision, anchor, block)

    for index, anchor in enumerate(anchors):
        limits, size = _limits(anchor.device), anchor.numel()
        if size > max(limits.small, limits.listed):
            yield group([index], limits.block, as_lists=False)
            continue
        as_lists = size > limits.small
        key = anchor.device, anchor.dtype, as_lists
        if key in open_groups and open_sizes[key] + size > limits.block:
            yield group(open_groups.pop(key), limits.block, as_lists=as_lists)
        if key not in open_groups:
            open_groups[key], open_sizes[key] = [], 0
        open_groups[key].append(index)
        open_sizes[key] += size
    for (device, _, as_lists), indices in open_groups.items():
        yield group(indices, _limits(device).block, as_lists=as_lists)


def _limits(device: torch.device) -> Limits:
    return CPU if device.type == "cpu" else ACCELERATOR


def _flat(tensors: list[Tensor]) -> Tensor:
    """All entries in one dimension: a view of a single contiguous tensor, else a copy."""
    flat: Tensor = _flatten_dense_tensors(tensors)
    return flat


def _dot(distance: Tensor, gradient: Tensor) -> Tensor:
    """The real part of the inner product of two vectors.

    Complex vectors are read as pairs of real numbers: on a CPU that rounds less than `vdot` does.
    """
    if distance.is_complex():
        distance, gradient = (torch.view_as_real(each).flatten() for each in (distance, gradient))
    return torch.dot(distance, gradient)
