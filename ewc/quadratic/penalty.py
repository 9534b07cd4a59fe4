"""The penalty as a tensor: value and gradient in one pass over the memory.

Plain autograd reads and writes every array several times, for a sum that is limited by memory
alone. Here the parameters are taken in blocks that stay in cache, and the gradient is formed beside
the value. Small parameters are laid side by side, so that a hundred biases cost one operation.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd import Function


@dataclass(frozen=True)
class _Limits:
    """Numbers of elements."""

    small: int  # up to here, parameters are laid side by side (at the price of a second copy)
    block: int  # what is worked on at once


# Three float32 blocks fit a core's own cache. Elsewhere launches are what costs, and blocks only
# bound the scratch memory.
_CPU = _Limits(small=2**13, block=2**16)
_ACCELERATOR = _Limits(small=2**20, block=2**24)


class Penalty:
    """`strength / 2 * (sum of precision * |theta - anchor|^2 + constant)` as a function of thetas.

    Args:
        thetas: Tensors of the layout that the calls will have: shapes, dtypes and devices.
        precisions: For each of them, its curvature: same shape and device, real, at least float32.
        anchors: For each of them, same shape and device, at least as wide.
        constant: The value at the anchors.
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
        """The value, and for each group its gradient, flat, if asked for; without autograd."""
        gradients: list[Tensor] = []
        parts: dict[torch.device, list[Tensor]] = {}
        with _without_autocast(self._device_types):
            for group in self._groups:
                squares, gradient = group.evaluate(thetas, strength, with_gradient=with_gradients)
                parts.setdefault(squares[0].device, []).extend(squares)
                if gradient is not None:
                    gradients.append(gradient)
            if strength == 0:  # also where the squares have overflowed
                return torch.zeros((), dtype=self.dtype, device=self.device), gradients
            # Few and positive: nothing is lost in adding them up as they are.
            sums = [torch.stack(part).sum().to(self.device) for part in parts.values()]
            total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
            return (total + strength * self.constant).mul_(0.5).to(self.dtype), gradients

    def scaled(self, gradients: list[Tensor], factor: Tensor) -> list[Tensor]:
        """Multiply what `evaluate` returned, in place, and take it apart: one for each theta."""
        # Nearly always the loss has the penalty as a term, and the factor is 1. Only on the CPU can
        # that be seen for nothing.
        if factor.device.type != "cpu" or factor != 1:
            on = {device: factor.to(device) for device in {g.device for g in gradients}}
            for gradient in gradients:
                gradient.mul_(on[gradient.device])
        found: dict[int, Tensor] = {}
        for group, gradient in zip(self._groups, gradients, strict=True):
            found.update(group.split(gradient))
        return [found[index] for index in range(len(found))]

    def gradient(self, index: int, theta: Tensor, strength: float, factor: Tensor) -> Tensor:
        """The gradient of one theta by differentiable operations, rounded as in `evaluate`."""
        part = strength * (theta - self.anchors[index]) * self.precisions[index]
        return (part * factor.to(theta.device)).to(theta.dtype)


def expression(
    thetas: Sequence[Tensor],
    precisions: Sequence[Tensor],
    anchors: Sequence[Tensor],
    constant: float,
    strength: float,
) -> Tensor:
    """The same penalty by plain operations, for a compiler to fuse."""
    dtype, device = result_dtype(thetas), thetas[0].device
    total = torch.zeros((), dtype=dtype, device=device)
    with _without_autocast(sorted({theta.device.type for theta in thetas})):
        for theta, precision, anchor in zip(thetas, precisions, anchors, strict=True):
            distance = theta - anchor.to(theta.device)
            squared = (distance * distance.conj()).real if distance.is_complex() else distance**2
            total = total + (precision.to(theta.device) * squared).sum().to(device)
        return ((total + constant) * (0.5 * strength)).to(dtype)


def result_dtype(thetas: Sequence[Tensor]) -> torch.dtype:
    """The penalty's dtype: that of the widest theta, real, at least float32."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(theta.dtype in wide for theta in thetas) else torch.float32


class _Evaluate(Function):
    """`Penalty` for autograd.

    The first backward of a graph takes the gradient that forward has formed, and scales it in
    place. A later one (`retain_graph`) finds it gone and, like one that must itself be
    differentiable (`create_graph`), forms it anew from the parameters, whose saving makes autograd
    refuse where they have changed since.
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
        if ctx.strength == 0:  # also where the gradient has overflowed
            zeros = zip(needed, ctx.saved_tensors, strict=True)
            return (None, None, *(torch.zeros_like(p) if use else None for use, p in zeros))
        if gradients is None or torch.is_grad_enabled():
            found = [
                penalty.gradient(index, theta, ctx.strength, grad) if use else None
                for index, (use, theta) in enumerate(zip(needed, ctx.saved_tensors, strict=True))
            ]
        else:
            parts = zip(needed, penalty.scaled(gradients, grad), strict=True)
            found = [part if use else None for use, part in parts]
        return (None, None, *found)


class _Group:
    """Parameters of one device and dtype that are worked on as one flat tensor.

    Args:
        indices: Which thetas they are.
        thetas: Tensors of their layout.
        precisions: Their curvatures.
        anchors: Their anchors.
        block: How many elements to work on at once.
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
        # Views, unless small parameters are laid side by side here.
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
        """`strength` times sums of `precision * |theta - anchor|^2`, and the flat gradient."""
        theta = _flat([thetas[index] for index in self._indices])
        size = min(self._block, theta.numel())
        scratch = self._zero.new_empty(size)
        flat = self._zero.new_empty(theta.numel() if with_gradient else size)
        squares = []
        # Torch refuses a number that the dtype cannot hold, but not infinity.
        strength = strength if strength <= self._largest else math.inf
        for index, part in enumerate(torch.split(theta, self._block)):
            precision, anchor = self._blocks[index]
            size = part.numel()
            start = index * self._block if with_gradient else 0
            distance, gradient = scratch[:size], flat[start : start + size]
            torch.sub(part, anchor, out=distance)
            # A product of three in one operation.
            torch.addcmul(self._zero, distance, precision, value=strength, out=gradient)
            squares.append(torch.vdot(distance, gradient).real)
        return squares, flat if with_gradient else None

    def split(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Take a flat tensor apart: views of it, in the thetas' dtypes, by the thetas' index."""
        parts: Sequence[Tensor] = _unflatten_dense_tensors(flat, self._anchors)
        if self._narrowed:
            parts = [part.to(dtype) for part, dtype in zip(parts, self._dtypes, strict=True)]
        return zip(self._indices, parts, strict=True)


def _grouped(
    thetas: Sequence[Tensor], precisions: Sequence[Tensor], anchors: Sequence[Tensor]
) -> Iterator[_Group]:
    """Lay small parameters side by side, as many as make a block; leave others alone."""
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


@contextmanager
def _without_autocast(device_types: list[str]) -> Iterator[None]:
    """Switch autocast off where it is on."""
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
