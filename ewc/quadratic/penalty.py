"""The penalty as a tensor: its value and its gradient in one pass over the memory.

The sum is bound by memory traffic, and plain autograd reads and writes every array several times.
Here parameters are processed in blocks that fit into the cache, and the gradient is computed with
the value. Small parameters are concatenated, so that a hundred biases cost one operation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd import Function

from ewc._autocast import without_autocast


@dataclass(frozen=True)
class _Limits:
    """Sizes, in elements.

    Attributes:
        small: The largest parameter that is concatenated with others, which takes a second copy.
        block: How much is processed at once.
    """

    small: int
    block: int


# Three float32 blocks fit into a core's own cache. On an accelerator kernel launches dominate, and
# blocks only bound the workspace.
_CPU = _Limits(small=2**13, block=2**16)
_ACCELERATOR = _Limits(small=2**20, block=2**24)


class Penalty:
    """`strength / 2 * (sum of precision * |theta - anchor|^2 + constant)` as a function of thetas.

    Args:
        thetas: Tensors with the shapes, dtypes and devices that every call will have.
        precisions: The curvature for each theta: of its shape, on its device, real, at least
            float32.
        anchors: The anchor of each theta: of its shape, on its device, at least as wide.
        constant: The sum at the anchors.
    """

    def __init__(
        self,
        thetas: Sequence[Tensor],
        precisions: Sequence[Tensor],
        anchors: Sequence[Tensor],
        constant: float,
    ) -> None:
        self.precisions = precisions
        self.anchors = anchors
        self.constant = constant
        self.dtype, self.device = result_dtype(thetas), thetas[0].device
        self._groups = list(_grouped(thetas, precisions, anchors))
        self._device_types = sorted({theta.device.type for theta in thetas})

    def __call__(self, thetas: Sequence[Tensor], strength: float) -> Tensor:
        """The penalty, a scalar on the first theta's device, in at least float32."""
        value: Tensor = _Evaluate.apply(self, strength, *thetas)  # type: ignore[no-untyped-call]
        return value

    def evaluate(
        self, thetas: Sequence[Tensor], strength: float, *, with_gradients: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The value and, if needed, the flat gradient of each group; without autograd."""
        gradients: list[Tensor] = []
        parts: dict[torch.device, list[Tensor]] = {}
        with without_autocast(self._device_types):
            for group in self._groups:
                squares, gradient = group.evaluate(thetas, strength, with_gradient=with_gradients)
                parts.setdefault(squares[0].device, []).extend(squares)
                if gradient is not None:
                    gradients.append(gradient)
            if strength == 0:  # even if the squares have overflowed
                return torch.zeros((), dtype=self.dtype, device=self.device), gradients
            # The summands are few and >= 0: their own precision is enough.
            sums = [torch.stack(part).sum().to(self.device) for part in parts.values()]
            value = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
            return (value + strength * self.constant).mul_(0.5).to(self.dtype), gradients

    def scaled(self, gradients: list[Tensor], factor: Tensor) -> list[Tensor]:
        """The gradients of `evaluate`, multiplied in place, and split: one for each theta."""
        # In most losses the penalty is a summand, and the factor is 1. On the CPU the comparison
        # costs nothing; elsewhere it would synchronise.
        if factor.device.type != "cpu" or factor != 1:
            factors = {device: factor.to(device) for device in {g.device for g in gradients}}
            for gradient in gradients:
                gradient.mul_(factors[gradient.device])
        found: dict[int, Tensor] = {}
        for group, gradient in zip(self._groups, gradients, strict=True):
            found.update(group.split(gradient))
        return [found[index] for index in range(len(found))]

    def gradient(self, index: int, theta: Tensor, strength: float, factor: Tensor) -> Tensor:
        """The gradient of one theta by differentiable operations, rounded as in `evaluate`."""
        gradient = strength * (theta - self.anchors[index]) * self.precisions[index]
        return (gradient * factor.to(theta.device)).to(theta.dtype)


def expression(
    thetas: Sequence[Tensor],
    precisions: Sequence[Tensor],
    anchors: Sequence[Tensor],
    constant: float,
    strength: float,
) -> Tensor:
    """The same penalty by plain operations, which a compiler can fuse."""
    dtype, device = result_dtype(thetas), thetas[0].device
    value = torch.zeros((), dtype=dtype, device=device)
    with without_autocast(sorted({theta.device.type for theta in thetas})):
        for theta, precision, anchor in zip(thetas, precisions, anchors, strict=True):
            distance = theta - anchor.to(theta.device)
            squared = (distance * distance.conj()).real if distance.is_complex() else distance**2
            value = value + (precision.to(theta.device) * squared).sum().to(device)
        return ((value + constant) * (0.5 * strength)).to(dtype)


def result_dtype(thetas: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the penalty: that of the widest theta, but real and at least float32."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(theta.dtype in wide for theta in thetas) else torch.float32


class _Evaluate(Function):
    """`Penalty` as an autograd function.

    The first backward of a graph uses the gradient that forward has computed, and scales it in
    place. A later one (`retain_graph`), and one that must be differentiable (`create_graph`),
    compute it again from the saved parameters; autograd raises if these have changed since.
    """

    @staticmethod
    def forward(ctx: Any, penalty: Penalty, strength: float, *thetas: Tensor) -> Tensor:
        needed = any(ctx.needs_input_grad)
        value, gradients = penalty.evaluate(thetas, strength, with_gradients=needed)
        if needed:
            ctx.save_for_backward(*thetas)
            ctx.penalty, ctx.strength, ctx.gradients = penalty, strength, gradients
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        penalty: Penalty = ctx.penalty
        gradients, ctx.gradients = ctx.gradients, None
        needed = ctx.needs_input_grad[2:]
        if ctx.strength == 0:  # even if the gradient has overflowed
            zeros = zip(needed, ctx.saved_tensors, strict=True)
            return (None, None, *(torch.zeros_like(p) if use else None for use, p in zeros))
        if gradients is None or torch.is_grad_enabled():
            found = [
                penalty.gradient(index, theta, ctx.strength, grad) if use else None
                for index, (use, theta) in enumerate(zip(needed, ctx.saved_tensors, strict=True))
            ]
        else:
            scaled = zip(needed, penalty.scaled(gradients, grad), strict=True)
            found = [gradient if use else None for use, gradient in scaled]
        return (None, None, *found)


class _Group:
    """Parameters of one device and dtype that are processed as one flat tensor.

    Args:
        indices: The positions of these parameters among all thetas.
        thetas: Tensors with their shapes and dtypes.
        precisions: Their curvatures.
        anchors: Their anchors.
        block: How many elements are processed at once.
    """

    def __init__(
        self,
        indices: list[int],
        thetas: list[Tensor],
        precisions: list[Tensor],
        anchors: list[Tensor],
        block: int,
    ) -> None:
        self._indices = indices
        self._dtypes = [theta.dtype for theta in thetas]
        self._anchors = anchors
        self._block = block
        self._zero = anchors[0].new_zeros(())
        self._largest = torch.finfo(self._zero.dtype).max
        self._narrowed = any(dtype is not self._zero.dtype for dtype in self._dtypes)
        # Views of a single parameter; copies of several small ones.
        self._blocks = list(
            zip(
                torch.split(_flat(precisions), block),
                torch.split(_flat(anchors), block),
                strict=True,
            )
        )

    def evaluate(
        self, thetas: Sequence[Tensor], strength: float, *, with_gradient: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """`strength * precision * |theta - anchor|^2`, summed by block, and the flat gradient."""
        theta = _flat([thetas[index] for index in self._indices])
        size = min(self._block, theta.numel())
        workspace = self._zero.new_empty(size)
        flat = self._zero.new_empty(theta.numel() if with_gradient else size)
        squares = []
        # PyTorch refuses a number that the dtype cannot hold, and accepts infinity.
        strength = strength if strength <= self._largest else math.inf
        for index, part in enumerate(torch.split(theta, self._block)):
            precision, anchor = self._blocks[index]
            size = part.numel()
            start = index * self._block if with_gradient else 0
            distance, gradient = workspace[:size], flat[start : start + size]
            torch.sub(part, anchor, out=distance)
            # strength * distance * precision in one operation.
            torch.addcmul(self._zero, distance, precision, value=strength, out=gradient)
            squares.append(torch.vdot(distance, gradient).real)
        return squares, flat if with_gradient else None

    def split(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Views of a flat tensor, in the shapes and dtypes of the thetas, by their positions."""
        parts: Sequence[Tensor] = _unflatten_dense_tensors(flat, self._anchors)
        if self._narrowed:
            parts = [part.to(dtype) for part, dtype in zip(parts, self._dtypes, strict=True)]
        return zip(self._indices, parts, strict=True)


def _grouped(
    thetas: Sequence[Tensor], precisions: Sequence[Tensor], anchors: Sequence[Tensor]
) -> Iterator[_Group]:
    """Groups of small parameters, up to a block each; each other parameter is its own group."""
    open_groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}

    def group(indices: list[int], block: int) -> _Group:
        theta, precision, anchor = (
            [tensors[index] for index in indices] for tensors in (thetas, precisions, anchors)
        )
        return _Group(indices, theta, precision, anchor, block)

    for index, anchor in enumerate(anchors):
        limits = _CPU if anchor.device.type == "cpu" else _ACCELERATOR
        if anchor.numel() > limits.small:
            yield group([index], limits.block)
            continue
        indices = open_groups.setdefault((anchor.device, anchor.dtype), [])
        if sum(anchors[i].numel() for i in indices) + anchor.numel() > limits.block:
            yield group(list(indices), limits.block)
            indices.clear()
        indices.append(index)
    for (device, _), indices in open_groups.items():
        yield group(indices, (_CPU if device.type == "cpu" else _ACCELERATOR).block)


def _flat(tensors: list[Tensor]) -> Tensor:
    """All entries in one dimension: a view of a single contiguous tensor, else a copy."""
    flat: Tensor = _flatten_dense_tensors(tensors)
    return flat
