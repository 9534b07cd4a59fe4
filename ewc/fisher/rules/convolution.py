"""Convolutions in 1 to 3 dimensions, and transposed ones.

A convolution's weight gradient is a matrix product of the output's gradient with the *patches*
of the input: the values, in every channel, that one output position reads. In a transposed
convolution the two change places: the patches are cut from the output's gradient.

Index legend: `n` sample, `b` further batch dimension within a sample, `g` group, `p` position,
`o`/`c` output/input channel of the group, `k` place in the kernel.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ewc.fisher.gradients import Gradient, Outer, Sum, alike, work_elements
from ewc.fisher.rules.registry import Operation, rule

NARROW = 16
"""How many places of the kernel and channels make a row worth a product of its own."""


class Window(NamedTuple):
    """How a kernel moves over an image.

    Attributes:
        stride: The step between patches, in each dimension.
        dilation: The step within a patch, in each dimension.
        margins: The zeros around the image, as in `F.pad`.
        groups: How many groups the channels fall into.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    margins: list[int]
    groups: int


class Patches(Gradient):
    """`grad[n, g, o, (c, k)] = sum_bp out[n, b, g, o, p] * patch[n, b, g, (c, k), p]`.

    Patches overlap. Written out in full, they take as many times the memory of the image as the
    kernel has places. Where it pays, the rows of the kernel (its first dimension) are not written
    out: what the next row reads is the same memory, begun some rows of the image further on.

    Index legend: `r` row of the kernel where rows are not written out, else a single one; `k`
    place in what is written out.

    Args:
        image: `[N, B, C, *space]`: what the patches are cut from.
        out: `[N, B, O, *places]`: what the patch of each position is multiplied with.
        shape: The weight's shape, `[O, C / groups, *kernel]`.
        window: How the kernel moves.
    """

    def __init__(self, image: Tensor, out: Tensor, shape: Sequence[int], window: Window) -> None:
        self.image, self.out, self.shape, self.window = image, out, tuple(shape), window
        self.samples = image.shape[0]
        self._places = tuple(out.shape[3:])
        self._across = math.prod(self._places[1:])  # positions in a row of positions
        rows_overlap = window.stride[0] == 1 and math.prod(self.shape[1:]) >= NARROW * self.shape[2]
        self._kernel_rows = self.shape[2] if rows_overlap else 1
        self._first_written = 1 if rows_overlap else 0
        self._written = self.shape[2 + self._first_written :]
        # Elements that are written out for one sample and one row of positions.
        self._row_elements = max(
            1, math.prod(image.shape[1:3]) * math.prod(self._written) * self._across
        )

    @override
    def elements_per_sample(self, sums: Tensor) -> int:
        rows = min(self._places[0], self._rows_at_a_time(sums))
        return max(sums.numel(), self._row_elements * rows)

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        rows = self._rows_at_a_time(self.out)
        image, out = alike(self.image[start:stop], self.out[start:stop])
        product = self._product(image, out, 0, rows)
        for top in range(rows, self._places[0], rows):
            product += self._product(image, out, top, top + rows)
        return product

    @override
    def add_squares(self, sums: Tensor) -> None:
        is_plain = self.window.groups == 1 and self.out.shape[1] == 1
        if not is_plain or self._rows_at_a_time(sums) < self._places[0]:
            super().add_squares(sums)
            return
        step = max(1, 8 * work_elements(sums) // (self._row_elements * self._places[0]))
        squares = sums.new_zeros(
            self._kernel_rows, sums[0].numel() // self._kernel_rows, self.shape[0]
        )
        for image, out in zip(self.image.split(step), self.out.split(step), strict=True):
            patches = self._patches(image.to(sums.dtype), 0, self._places[0])[:, 0, 0]
            right = out[:, 0].to(sums.dtype).flatten(2).mT
            for row, part in zip(patches.unbind(1), squares, strict=True):
                Outer(row.mT, right).add_squares(part)
        sums.add_(self._as_weight(squares.mT.unsqueeze(0))[0])

    def _rows_at_a_time(self, tensor: Tensor) -> int:
        """How many rows of positions may be written out at a time for one sample."""
        return max(1, 8 * work_elements(tensor) // self._row_elements)

    def _product(self, image: Tensor, out: Tensor, top: int, bottom: int) -> Tensor:
        """The gradients that some rows of the positions give, `[n, *shape]`."""
        bottom = min(bottom, self._places[0])
        out = out[:, :, :, top:bottom].flatten(3)
        out = torch.unflatten(out, 2, (self.window.groups, -1))
        rows = self._patches(image, top, bottom).unbind(3)
        product = torch.stack([(out @ row.mT).sum(1) for row in rows], 1)  # [n, r, g, o, (c, k)]
        return self._as_weight(product.flatten(2, 3))

    def _as_weight(self, product: Tensor) -> Tensor:
        """`[n, r, (g, o), (c, k)] -> [n, *shape]`."""
        weight = product.transpose(1, 2).unflatten(3, (self.shape[1], *self._written))
        whole: Tensor = weight.movedim(2, 3).reshape(len(product), *self.shape)
        return whole

    def _patches(self, image: Tensor, top: int, bottom: int) -> Tensor:
        """Patches `[n, b, g, r, (c, k), p]` of the rows `top` to `bottom - 1` of the positions."""
        windows = self._cropped(image, top, bottom)
        for dim in range(self._first_written, len(self._places)):
            places = bottom - top if dim == 0 else self._places[dim]
            windows = windows.unfold(3 + dim, 1 + self._reach(dim), self.window.stride[dim])
            windows = windows.narrow(3 + dim, 0, places)[..., :: self.window.dilation[dim]]
        # [n, b, c, *places, *k], where the rows of places include those that the next kernel rows
        # read, if these are not written out
        spread = tuple(range(3 + len(self._places), windows.dim()))
        written = windows.movedim(spread, tuple(range(3, 3 + len(spread)))).contiguous()
        written = written.view(
            *image.shape[:2], self.window.groups, self.shape[1] * math.prod(self._written), -1
        )
        step = self.window.dilation[0] * self._across
        return written.unfold(4, (bottom - top) * self._across, step).movedim(4, 3)

    def _cropped(self, image: Tensor, top: int, bottom: int) -> Tensor:
        """The rows of the image that some rows of the positions read, with all margins."""
        stride, margins = self.window.stride[0], self.window.margins
        first = top * stride - margins[-2]
        end = first + (bottom - top - 1) * stride + self._reach(0) + 1
        image = image[:, :, :, max(0, first) : max(0, end)]
        margins = [*margins[:-2], max(0, -first), max(0, end - self.image.shape[3])]
        return F.pad(image, margins) if any(margins) else image

    def _reach(self, dim: int) -> int:
        """The distance between the first and the last place of the kernel, in the image."""
        return self.window.dilation[dim] * (self.shape[2 + dim] - 1)


def _window(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_padding: int | Sequence[int] = 0,
) -> Window:
    """The window of a convolution with these arguments; more output moves nothing."""
    dims = weight.dim() - 2

    def each(value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))

    if padding == "same":
        spans = [d * (k - 1) for k, d in zip(weight.shape[2:], each(dilation), strict=True)]
        pairs = [(span // 2, span - span // 2) for span in spans]
    else:
        pairs = [(one, one) for one in each(0 if isinstance(padding, str) else padding)]
    margins = [margin for pair in reversed(pairs) for margin in pair]
    return Window(each(stride), each(dilation), margins, groups)


def _define(function: Callable[..., Tensor], *names: str, transposed: bool = False) -> None:
    """Register the rule of a convolution.

    Args:
        function: The convolution.
        names: Those of its arguments behind the bias, in their order.
        transposed: Whether it is a transposed one.
    """

    @rule(function)
    def convolve(
        op: Operation,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *positional: Any,
        **keywords: Any,
    ) -> Tensor:
        x, value = op.samples(input), op.value(weight)
        shift = None if bias is None else op.value(bias)
        options = {**dict(zip(names, positional, strict=False)), **keywords}
        lead = x.shape[: 1 - value.dim()]  # the samples join the batch dimension, if there is one
        out = function(x.flatten(0, len(lead) - 1), value, shift, *positional, **keywords)
        window = _window(value, **options)

        def images(tensor: Tensor) -> Tensor:
            """`[N, (b,) C, *space] -> [N, B, C, *space]`."""
            return tensor.reshape(len(tensor), -1, *tensor.shape[len(lead) :])

        def weight_gradient(g: Tensor) -> Patches:
            image, out = (g, x) if transposed else (x, g)
            return Patches(images(image), images(out), value.shape, window)

        def bias_gradient(g: Tensor) -> Sum:
            return Sum(images(g).flatten(3).sum(3))

        out = torch.unflatten(out, 0, lead)
        return op.record(out, {weight: weight_gradient, bias: bias_gradient})


for _dims in "123":
    _define(getattr(F, f"conv{_dims}d"), "stride", "padding", "dilation", "groups")
    _define(
        getattr(F, f"conv_transpose{_dims}d"),
        *("stride", "padding", "output_padding", "groups", "dilation"),
        transposed=True,
    )
