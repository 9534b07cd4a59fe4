"""Parameters added to samples, or multiplied with them, with broadcasting.

Positions, scales and shifts by hand, the weight of an RMS norm. With `g` for the gradient of the
output, each rule says what the gradients of the operands are; they are then summed over the
dimensions along which the operand was broadcast.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ewc.fisher.gradients import Gradient, Sum
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule

Slope = Callable[[Tensor], Tensor]
"""`slope(g)`: the gradient of one operand, not yet summed over what was broadcast, `[N, ...]`."""


def _pointwise(
    op: Operation,
    function: Callable[..., Tensor],
    operands: Sequence[Any],
    slopes: Callable[..., Sequence[Slope]],
) -> Tensor:
    """`function(*operands)`, of which some are parameters.

    `slopes(*operands)` gives one for each operand, which keeps no more than it needs.
    """
    if not all(isinstance(operand, Tensor) for operand in operands):
        raise NotCovered
    dims = max(operand.dim() for operand in operands)
    dtypes = {operand.dtype for operand in operands} - {torch.bool}
    if len(dtypes) > 1 and any(
        operand.dim() == 0 and not op.is_protected(operand) for operand in operands
    ):
        raise NotCovered  # a number's type gives way to a tensor's; with the samples it is a tensor
    protected = [operand for operand in operands if op.is_protected(operand)]
    if len(set(protected)) < len(protected):
        raise NotCovered
    aligned, gradients = [], {}
    for operand in operands:
        if op.is_protected(operand):
            aligned.append(op.value(operand))
        else:
            x = op.samples(operand)
            aligned.append(x.reshape(len(x), *[1] * (dims - operand.dim()), *operand.shape))
    for operand, slope in zip(operands, slopes(*aligned), strict=True):
        if op.is_protected(operand):
            gradients[operand] = _summed(slope, operand.shape)
    return op.record(function(*aligned), gradients)


def _summed(slope: Slope, shape: Sequence[int]) -> Callable[[Tensor], Gradient]:
    """The gradients of a parameter of this shape: sums over what it was broadcast over."""

    def gradient(g: Tensor) -> Sum:
        each = slope(g)
        ones = [1] * (each.dim() - 1 - len(shape))
        return Sum(each.sum_to_size(len(each), *ones, *shape).view(len(each), 1, *shape))

    return gradient


@rule(torch.add, torch.Tensor.add)
def add(op: Operation, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    """`a + alpha b`: `grad a = g`, `grad b = alpha g`."""
    return _pointwise(
        op,
        lambda a, b: torch.add(a, b, alpha=alpha),
        (input, other),
        lambda a, b: (lambda g: g, lambda g: g if alpha == 1 else g * alpha),
    )


@decomposition(torch.sub, torch.Tensor.sub, torch.subtract, torch.Tensor.subtract)
def subtract(input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    """`input - alpha * other`."""
    return torch.add(input, other, alpha=-alpha)


@rule(torch.mul, torch.Tensor.mul, torch.multiply, torch.Tensor.multiply)
def multiply(op: Operation, input: Any, other: Any) -> Tensor:
    """`a b`: `grad a = g b`, `grad b = g a`."""
    return _pointwise(
        op, torch.mul, (input, other), lambda a, b: (lambda g: g * b, lambda g: g * a)
    )


@rule(torch.div, torch.Tensor.div, torch.true_divide, torch.Tensor.true_divide)
def divide(op: Operation, input: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    """`a / b`: `grad a = g / b`, `grad b = -g a / b^2`."""
    if rounding_mode is not None:
        raise NotCovered
    return _pointwise(
        op,
        torch.div,
        (input, other),
        lambda a, b: (lambda g: g / b, lambda g: -g * (a / b) / b),
    )


def _as_tensor(operand: Any, like: Any) -> Any:
    """A real number as a tensor of the dtype of the other operand, which it does not widen."""
    if isinstance(operand, (int, float)) and isinstance(like, Tensor) and like.is_floating_point():
        return torch.full([1] * like.dim(), operand, dtype=like.dtype, device=like.device)
    return operand


@rule(torch.where)
def where(op: Operation, condition: Tensor, input: Any, other: Any) -> Tensor:
    """`a` or `b`, such as a token for what is masked: `grad a = g` where the condition holds."""
    input, other = _as_tensor(input, other), _as_tensor(other, input)
    return _pointwise(
        op,
        torch.where,
        (condition, input, other),
        lambda c, a, b: (
            lambda g: g,
            lambda g: torch.where(c, g, 0),
            lambda g: torch.where(c, 0, g),
        ),
    )


@decomposition(torch.addcmul, torch.Tensor.addcmul)
def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """`input + value * tensor1 * tensor2`."""
    return torch.add(input, torch.mul(tensor1, tensor2), alpha=value)


@decomposition(torch.lerp, torch.Tensor.lerp)
def lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    """`input + weight * (end - input)`."""
    return torch.add(input, torch.mul(torch.sub(end, input), weight))


def _in_place(method: Callable[..., Tensor], function: Callable[..., Tensor]) -> None:
    """Register the decomposition of `x.add_(parameter)` or another method like it."""

    @decomposition(method)
    def write(input: Tensor, other: Any) -> Tensor:
        # A rule may keep what it multiplies, which must not be what is written to.
        return input.copy_(function(input.clone(), other))


_in_place(torch.Tensor.add_, torch.add)
_in_place(torch.Tensor.sub_, torch.sub)
_in_place(torch.Tensor.mul_, torch.mul)
_in_place(torch.Tensor.div_, torch.div)
