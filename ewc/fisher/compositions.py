"""Per-sample gradients made of others: scaled, in another order, of overlapping parts."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from ewc.fisher.gradients import Gradient


class Scaled(Gradient):
    """`grad[n] = factor * inner.grad[n]`, element by element.

    Args:
        inner: The gradients of what was made of the parameter.
        factor: Its derivative, `[*shape]`.
    """

    def __init__(self, inner: Gradient, factor: Tensor) -> None:
        self.inner, self.factor = inner, factor
        self.samples = inner.samples

    @override
    def work(self, total: Tensor) -> int:
        return self.inner.work(total)

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        return self.inner.per_sample(start, stop) * self.factor

    @override
    def add_squares(self, total: Tensor) -> None:
        squares = torch.zeros_like(total)
        self.inner.add_squares(squares)
        total.add_(squares * self.factor.to(total.dtype).square())


class Arranged(Gradient):
    """`grad[n] = inner.grad[n].reshape(shape).permute(order)`: the same elements, elsewhere.

    Args:
        inner: Gradients `[*flat]`.
        flat: Their shape.
        shape: What that is taken apart into.
        order: Which of its dimensions becomes the first one of the parameter, and so on.
    """

    def __init__(
        self, inner: Gradient, flat: Sequence[int], shape: Sequence[int], order: Sequence[int]
    ) -> None:
        self.inner, self.flat, self.shape, self.order = inner, flat, shape, order
        self.samples = inner.samples

    @override
    def work(self, total: Tensor) -> int:
        return self.inner.work(total)

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        gradient = self.inner.per_sample(start, stop).reshape(-1, *self.shape)
        return gradient.permute(0, *(dim + 1 for dim in self.order))

    @override
    def add_squares(self, total: Tensor) -> None:
        back = [self.order.index(dim) for dim in range(len(self.order))]
        apart = total.permute(back)
        flat = apart.reshape(tuple(self.flat))
        self.inner.add_squares(flat)
        if flat.untyped_storage().data_ptr() != total.untyped_storage().data_ptr():
            apart.copy_(flat.view(tuple(self.shape)))


class Overlapping(Gradient):
    """Parts of one parameter that share elements: they are summed where they do.

    Args:
        total: The sum of squares of the parameter.
        parts: For each part its place in it, a view, and its gradients.
    """

    def __init__(self, total: Tensor, parts: Sequence[tuple[Tensor, Gradient]]) -> None:
        self.total, self.parts = total, parts
        self.samples = parts[0][1].samples

    @override
    def work(self, total: Tensor) -> int:
        return max(total.numel(), *(gradient.work(place) for place, gradient in self.parts))

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        n, size, first = stop - start, self.total.numel(), self.total.storage_offset()
        memory = self.total.new_zeros(n, size)
        for place, gradient in self.parts:
            at = place.storage_offset() - first
            part = memory.as_strided((n, *place.shape), (size, *place.stride()), at)
            part.add_(gradient.per_sample(start, stop))
        return memory.as_strided((n, *self.total.shape), (size, *self.total.stride()))
