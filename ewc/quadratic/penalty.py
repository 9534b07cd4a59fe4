"""The penalty as a tensor: its value and its gradient in one pass over the memory.

Plain autograd reads and writes every array several times. Here the gradient is computed with the
value, in the forward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ewc._autocast import without_autocast
from ewc.quadratic.kernels import grouped


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
        self._groups = list(grouped(precisions, anchors))
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
    dtype: torch.dtype,
) -> Tensor:
    """The same penalty by plain operations, which a compiler can fuse, in the given dtype."""
    for kind in {theta.device.type for theta in thetas}:
        if torch.is_autocast_enabled(kind):
            # No context manager of our own: the compiler inlines them only from torch 2.11 on.
            with torch.autocast(kind, enabled=False):
                return expression(thetas, precisions, anchors, constant, strength, dtype)
    device = thetas[0].device
    value = torch.zeros((), dtype=dtype, device=device)
    for theta, precision, anchor in zip(thetas, precisions, anchors, strict=True):
        distance = theta - anchor.to(theta.device)
        squared = (distance * distance.conj()).real if distance.is_complex() else distance**2
        value = value + (precision.to(theta.device) * squared).sum().to(device)
    return ((value + constant) * (0.5 * strength)).to(dtype)


def origin(device: torch.device) -> Tensor:
    """A leaf that `zero` begins a graph at, where a compiler cannot make one of its own."""
    with torch.inference_mode(False):
        return torch.zeros((), device=device, requires_grad=True)


def zero(thetas: Sequence[Tensor], leaf: Tensor) -> Tensor:
    """The penalty of these parameters before anything is consolidated.

    `backward()` on it alone is no error, as on a penalty after that, and leaves the gradients of
    the parameters as they are: None, where they are None. An optimizer would apply weight decay and
    momentum to gradients of zero.

    Args:
        thetas: The parameters.
        leaf: An `origin`.
    """
    dtype, device = result_dtype(thetas), thetas[0].device
    if not torch.compiler.is_compiling():
        leaf = torch.zeros((), dtype=dtype, device=device, requires_grad=torch.is_grad_enabled())
    return leaf.to(device, dtype, copy=True)  # no leaf: it may be changed in place


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
