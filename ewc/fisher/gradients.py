"""Per-sample gradients in factored form, and the sum of their squares.

A rule knows the per-sample gradients of a parameter as a formula of two tensors: the input of the
operation, and the gradient of its output. In this form they are as small as the activations;
written out they would be as large as one copy of the parameter per sample. Each class here adds
their squares to `sums`, a tensor of the parameter's shape, and writes out the gradients of a
few samples at a time at most.

Index legend: `n` sample, `s` shared position (time step, pixel, ...), `o`/`i` rows/columns.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self, override

LARGE_MATRIX = 2**12
"""A matrix has calls of its own beyond this many elements."""


def work_elements(tensor: Tensor) -> int:
    """How many elements of `tensor`'s kind may be written out at a time.

    On a CPU as many as stay in the second-level cache (half a MiB), else 64 MiB, so that
    a kernel launch is worth its cost.
    """
    budget = 2**19 if tensor.is_cpu else 2**26
    return budget // tensor.element_size()


def alike(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of a product in the wider of their types, which differ under autocast."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


class Gradient(ABC):
    """The gradients of N samples with respect to one parameter, or one effective weight.

    Attributes:
        samples: N.
    """

    samples: int

    @abstractmethod
    def per_sample(self, start: int, stop: int) -> Tensor:
        """The gradients of samples `start` to `stop - 1`, shape `[stop - start, *shape]`."""

    def elements_per_sample(self, sums: Tensor) -> int:
        """How many elements `add_squares(sums)` writes out for each sample."""
        return sums.numel()

    def add_squares(self, sums: Tensor) -> None:
        """Add the sum over samples of the squared gradients to `sums`, shape `[*shape]`."""
        step = max(1, work_elements(sums) // max(1, self.elements_per_sample(sums)))
        for start in range(0, self.samples, step):
            _add_squares(sums, self.per_sample(start, min(start + step, self.samples)))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> "Gradient":
        """The sum of several gradients of the same kind, one for each use of the parameter."""
        return Several(parts)


def _add_squares(sums: Tensor, gradients: Tensor) -> None:
    """Add the sum of the squares of `gradients`, `[n, *shape]`, in the precision of `sums`."""
    gradients = gradients.to(sums.dtype)
    sums.add_((gradients * gradients).sum(0))


class Several(Gradient):
    """A parameter used more than once: the uses are summed before the square is taken."""

    def __init__(self, parts: Sequence[Gradient]) -> None:
        self.parts = parts
        self.samples = parts[0].samples

    @override
    def elements_per_sample(self, sums: Tensor) -> int:
        return max(part.elements_per_sample(sums) for part in self.parts)

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        gradient = self.parts[0].per_sample(start, stop)
        for part in self.parts[1:]:
            gradient = gradient + part.per_sample(start, stop)
        return gradient


def summed(gradients: Sequence[Gradient]) -> Gradient:
    """The sum of the gradients of several uses, of one kind or of different kinds."""
    if len(gradients) == 1:
        return gradients[0]
    kinds = {type(gradient) for gradient in gradients}
    return kinds.pop().joined(gradients) if len(kinds) == 1 else Several(gradients)


class Sum(Gradient):
    """`grad[n] = sum_s g[n, s]`: a bias, or anything added at every position.

    Args:
        summands: `[N, S, *shape]`.
    """

    def __init__(self, summands: Tensor) -> None:
        self.summands = summands
        self.samples = summands.shape[0]

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        return self.summands[start:stop].sum(1)

    @override
    def add_squares(self, sums: Tensor) -> None:
        shared = self.summands.shape[1] != 1
        _add_squares(sums, self.summands.sum(1) if shared else self.summands.squeeze(1))

    @override
    @classmethod
    def joined(cls, parts: Sequence["Sum"]) -> Gradient:
        return cls(torch.cat([part.summands for part in parts], 1))


class Outer(Gradient):
    """`grad[n, o, i] = sum_s left[n, s, o] * right[n, s, i]`: a matrix product with shared weight.

    In a stack of matrices this holds for each of them. With one position, S = 1, the sum of squares
    is a product of matrices: sum_n (left[n, o] * right[n, i])^2 = sum_n left[n, o]^2 right[n, i]^2.

    Source: Dangel, Kunstner & Hennig, "BackPACK: Packing more into backprop", ICLR 2020, second
    moments of linear layers.

    Args:
        left: `[N, S, O]`, for a linear layer the gradient of its output; or a stack `[N, E, S, O]`.
        right: `[N, S, I]`, for a linear layer its input; or a stack `[N, E, S, I]`.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.samples = left.shape[0]

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        left, right = alike(self.left[start:stop], self.right[start:stop])
        return left.mT @ right

    @override
    def add_squares(self, sums: Tensor) -> None:
        left, right = self.left.to(sums.dtype), self.right.to(sums.dtype)
        positions = left.shape[-2]
        if left.dim() == 4 and (positions == 1 or sums[0].numel() > LARGE_MATRIX):
            for one, other, each in zip(left.unbind(1), right.unbind(1), sums, strict=True):
                Outer(one, other).add_squares(each)
        elif left.dim() == 4:
            super().add_squares(sums)
        elif sums.stride(0) < sums.stride(1):  # a transposed view: write its rows as they lie
            Outer(right, left).add_squares(sums.t())
        elif positions == 1:
            # sum_n (g_o a_i)^2 = sum_n g_o^2 a_i^2: one product of matrices.
            step = max(1, 8 * work_elements(sums) // sum(sums.shape))
            for rows, columns in zip(left.split(step), right.split(step), strict=True):
                rows, columns = rows.squeeze(1), columns.squeeze(1)
                sums.addmm_((rows * rows).t(), columns * columns)
        elif sums.is_cpu and sums.numel() > LARGE_MATRIX:
            _add_squares_in_cache(sums, left, right)
        else:
            Gradient.add_squares(Outer(left, right), sums)

    @override
    @classmethod
    def joined(cls, parts: Sequence["Outer"]) -> Gradient:
        return cls(
            torch.cat([part.left for part in parts], -2),
            torch.cat([part.right for part in parts], -2),
        )


def _add_squares_in_cache(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Square the products of a few samples while they are in the cache.

    One call computes several products, as many for each thread. A matrix that does not fit is
    computed one block of rows at a time.
    """
    fit = 2 * work_elements(sums)
    height, width = sums.shape
    rows = math.ceil(height / math.ceil(sums.numel() / fit))
    threads = torch.get_num_threads()
    step = max(1, fit // (rows * width) // threads * threads)
    step = min(step, len(left))
    scratch = sums.new_empty(step * rows * width)
    for top in range(0, height, rows):
        block = sums[top : top + rows]
        columns = left[:, :, top : top + rows].mT
        for some, others in zip(columns.split(step), right.split(step), strict=True):
            products = scratch[: len(some) * block.numel()].view(len(some), *block.shape)
            torch.bmm(some, others, out=products)
            for product in products.unbind(0):
                block.addcmul_(product, product)


class Rows(Gradient):
    """`grad[n, v] = sum of g[n, s] over the s with index[n, s] = v`: an embedding.

    Args:
        index: `[N, S]`, integer, the row that each position read.
        summands: `[N, S, D]`.
        rows: the number of rows of the parameter.
    """

    def __init__(self, index: Tensor, summands: Tensor, rows: int) -> None:
        self.index, self.summands, self.rows = index, summands, rows
        self.samples = index.shape[0]

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        summands, index = self.summands[start:stop], self.index[start:stop]
        n, _, width = summands.shape
        gradient = summands.new_zeros(n * self.rows, width)
        offsets = torch.arange(n, device=index.device).unsqueeze(1) * self.rows
        gradient.index_add_(0, (index + offsets).flatten(), summands.flatten(0, 1))
        return torch.unflatten(gradient, 0, (n, self.rows))

    @override
    def add_squares(self, sums: Tensor) -> None:
        # Sorting puts positions of one sample that read the same row next to each other; they are
        # summed before squaring. No size depends on the data, so nothing synchronises.
        n, positions = self.index.shape
        index, order = self.index.sort(dim=1)
        starts = torch.ones_like(index, dtype=torch.bool)
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
        segment = starts.cumsum(1) - 1 + torch.arange(n, device=index.device)[:, None] * positions
        summands = self.summands.to(sums.dtype)
        summands = summands.gather(1, order.unsqueeze(2).expand_as(summands))
        row_sums = summands.new_zeros(n * positions, summands.shape[2])
        row_sums.index_add_(0, segment.flatten(), summands.flatten(0, 1))
        row = index.new_zeros(n * positions).scatter_(0, segment.flatten(), index.flatten())
        sums.index_add_(0, row, row_sums.square_())

    @override
    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> Gradient:
        return cls(
            torch.cat([part.index for part in parts], 1),
            torch.cat([part.summands for part in parts], 1),
            parts[0].rows,
        )


class Dense(Gradient):
    """Per-sample gradients written out, `[N, *shape]`: what autograd gives for a copy per sample.

    Args:
        gradients: `[N, *shape]`, real or complex; of a complex number the squared modulus counts.
    """

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients
        self.samples = gradients.shape[0]

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        return self.gradients[start:stop]

    @override
    def add_squares(self, sums: Tensor) -> None:
        if self.gradients.is_complex():
            Dense(self.gradients.real).add_squares(sums)
            Dense(self.gradients.imag).add_squares(sums)
        else:
            super().add_squares(sums)


def add_square(sums: Tensor, gradient: Tensor) -> None:
    """Add `|gradient|^2` to `sums`, both `[*shape]`, squared in the precision of `sums`."""
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    parts = (gradient.real, gradient.imag) if gradient.is_complex() else (gradient,)
    for part in parts:
        part = part.to(sums.dtype)
        sums.addcmul_(part, part)
