"""Convolutions in 1 to 3 dimensions, and transposed ones.

A convolution's weight gradient is a matrix product of the output's gradient with the *patches*
of the input: the values, in every channel, that one output position reads. In a transposed
convolution the two change places: the patches are cut from the output's gradient.

Index legend: `n` sample, `b` further batch dimension within a sample, `g` group, `p` position,
`o`/`c` output/input channel of the group, `k` place in the kernel.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ewc.fisher.gradients import Gradient, Outer, Total, alike, work_elements
from ewc.fisher.rules.registry import Operation, rule

NARROW = 16
"""How many places of the kernel and channels make a row worth a product of its own."""


class Patches(Gradient):
    """`grad[n, g, o, (c, k)] = sum_bp out[n, b, g, o, p] * patch[n, b, g, (c, k), p]`.

    Patches overlap. Written out in full, they take as many times the memory of the input as the
    kernel has places. Where it pays, they are written out along all dimensions but the first: in
    that, what the next row of the kernel reads is the same memory, begun some rows further on.

    Index legend: `r` row of the kernel (its first dimension) where rows overlap in memory, else
    a single one; `k` place in such a row.

    Args:
        read: `[N, B, C, *space]`: what the patches are cut from.
        margins: How it is padded with zeros, as in `F.pad`.
        out: `[N, B, O, *places]`: what the patch of each position is multiplied with.
        shape: The weight's shape, `[O, C / groups, *kernel]`.
        stride: The step between patches, in each dimension.
        dilation: The step within a patch, in each dimension.
        groups: How many groups the channels fall into.
    """

    def __init__(
        self,
        read: Tensor,
        margins: list[int],
        out: Tensor,
        shape: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.read, self.margins, self.out, self.shape = read, margins, out, tuple(shape)
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.samples = read.shape[0]
        self._places = tuple(out.shape[3:])
        self._overlaps = stride[0] == 1 and math.prod(self.shape[1:]) >= NARROW * self.shape[2]
        self._kernel_rows = self.shape[2] if self._overlaps else 1
        self._written = self.shape[3:] if self._overlaps else self.shape[2:]
        # Elements that are written out for one sample and one row of positions.
        across = math.prod(self._written) * math.prod(self._places[1:])
        self._per_row = max(1, math.prod(read.shape[1:3]) * across)

    @override
    def elements_per_sample(self, total: Tensor) -> int:
        return max(total.numel(), self._per_row * min(self._places[0], self._rows(total)))

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        # An image too large to write out is done some rows of positions at a time.
        rows = self._rows(self.out)
        read, out = alike(self.read[start:stop], self.out[start:stop])
        product = self._product(read, out, 0, rows)
        for top in range(rows, self._places[0], rows):
            product += self._product(read, out, top, top + rows)
        return product

    @override
    def add_squares(self, total: Tensor) -> None:
        if self.groups > 1 or self.out.shape[1] > 1 or self._rows(total) < self._places[0]:
            super().add_squares(total)
            return
        step = max(1, 8 * work_elements(total) // (self._per_row * self._places[0]))
        squares = total.new_zeros(
            self._kernel_rows, total[0].numel() // self._kernel_rows, self.shape[0]
        )
        for read, out in zip(self.read.split(step), self.out.split(step), strict=True):
            patches = self._patches(read.to(total.dtype), 0, self._places[0])[:, 0, 0]
            right = out[:, 0].to(total.dtype).flatten(2).mT
            for row, part in zip(patches.unbind(1), squares, strict=True):
                Outer(row.mT, right).add_squares(part)
        total.add_(self._as_weight(squares.mT.unsqueeze(0))[0])

    def _rows(self, tensor: Tensor) -> int:
        """How many rows of positions may be written out at a time for one sample."""
        return max(1, 8 * work_elements(tensor) // self._per_row)

    def _as_weight(self, product: Tensor) -> Tensor:
        """`[n, r, (g, o), (c, k)] -> [n, *shape]`."""
        weight = product.transpose(1, 2).unflatten(3, (self.shape[1], *self._written))
        whole: Tensor = weight.movedim(2, 3).reshape(len(product), *self.shape)
        return whole

    def _patches(self, read: Tensor, top: int, bottom: int) -> Tensor:
        """Patches `[n, b, g, r, (c, k), p]` of the rows `top` to `bottom - 1` of the positions."""
        stride, dilation = self.stride[0], self.dilation[0]
        rows, reach = bottom - top, dilation * (self.shape[2] - 1)
        first = top * stride - self.margins[-2]
        last = first + (rows - 1) * stride + reach + 1
        margins = [*self.margins[:-2], max(0, -first), max(0, last - read.shape[3])]
        read = _pad(read[:, :, :, max(0, first) : max(0, last)], margins)
        lead, space = read.stride()[:3], read.stride()[3:]
        rows_written = rows + reach if self._overlaps else rows
        steps = _times(space, self.dilation)[-len(self._written) :] if self._written else ()
        written = read.as_strided(
            (*read.shape[:3], *self._written, rows_written, *self._places[1:]),
            (*lead, *steps, *_times(space, self.stride)),
            read.storage_offset(),
        ).contiguous()
        across = math.prod(self._places[1:])
        written = written.view(*read.shape[:2], self.groups, -1, rows_written * across)
        *outer, place, _ = written.stride()
        return written.as_strided(
            (*written.shape[:3], self._kernel_rows, written.shape[3], rows * across),
            (*outer, dilation * across, place, 1),
            written.storage_offset(),
        )

    def _product(self, read: Tensor, out: Tensor, top: int, bottom: int) -> Tensor:
        """The gradients that some rows of the positions give, `[n, *shape]`."""
        bottom = min(bottom, self._places[0])
        out = out[:, :, :, top:bottom].flatten(3)
        out = torch.unflatten(out, 2, (self.groups, -1))
        rows = self._patches(read, top, bottom).unbind(3)
        product = torch.stack([(out @ row.mT).sum(1) for row in rows], 1)  # [n, r, g, o, (c, k)]
        return self._as_weight(product.flatten(2, 3))


def _times(strides: Sequence[int], steps: Sequence[int]) -> tuple[int, ...]:
    return tuple(stride * step for stride, step in zip(strides, steps, strict=True))


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def _margins(
    padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """What `F.pad` takes for the padding of a convolution."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        each = _each(0 if isinstance(padding, str) else padding, len(kernel))
        pairs = [(one, one) for one in each]
    return [margin for pair in reversed(pairs) for margin in pair]


def _pad(tensor: Tensor, margins: list[int]) -> Tensor:
    return F.pad(tensor, margins) if any(margins) else tensor


def _images(tensor: Tensor, dims: int) -> Tensor:
    """`[N, (b,) C, *space] -> [N, B, C, *space]`."""
    return tensor if tensor.dim() == dims + 3 else tensor.unsqueeze(1)


def _define(
    dims: int, convolution: Callable[..., Tensor], transposed: Callable[..., Tensor]
) -> None:
    """Register the rules of one number of dimensions."""

    @rule(convolution)
    def convolve(
        op: Operation,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        x = op.samples(input)
        value = op.value(weight)
        steps, gaps = _each(stride, dims), _each(dilation, dims)
        margins = _margins(padding, value.shape[2:], gaps)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        out = _folded(convolution, op, x, value, bias, dims, options)

        def weight_gradient(g: Tensor) -> Patches:
            return Patches(
                _images(x, dims), margins, _images(g, dims), value.shape, steps, gaps, groups
            )

        return op.record(out, {weight: weight_gradient, bias: lambda g: _bias(g, dims)})

    @rule(transposed)
    def convolve_transposed(
        op: Operation,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        x = op.samples(input)
        value = op.value(weight)
        steps, gaps = _each(stride, dims), _each(dilation, dims)
        margins = _margins(padding, value.shape[2:], gaps)
        options = {
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "groups": groups,
            "dilation": dilation,
        }
        out = _folded(transposed, op, x, value, bias, dims, options)

        def weight_gradient(g: Tensor) -> Patches:
            return Patches(
                _images(g, dims), margins, _images(x, dims), value.shape, steps, gaps, groups
            )

        return op.record(out, {weight: weight_gradient, bias: lambda g: _bias(g, dims)})


def _folded(
    function: Callable[..., Tensor],
    op: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dims: int,
    options: dict[str, Any],
) -> Tensor:
    """The operation on all samples at once: the samples join the batch dimension."""
    out = function(
        x.flatten(0, x.dim() - dims - 2),
        weight,
        None if bias is None else op.value(bias),
        **options,
    )
    return torch.unflatten(out, 0, x.shape[: x.dim() - dims - 1])


def _bias(g: Tensor, dims: int) -> Total:
    """`grad b[n, o] = sum_bp g[n, b, o, p]`."""
    return Total(_images(g, dims).flatten(3).sum(3))


_define(1, F.conv1d, F.conv_transpose1d)
_define(2, F.conv2d, F.conv_transpose2d)
_define(3, F.conv3d, F.conv_transpose3d)
