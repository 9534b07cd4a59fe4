"""Convolutions in 1 to 3 dimensions, and transposed ones.

A convolution's weight gradient is a matrix product of the output's gradient with the *patches*
of the input: the values, in every channel, that one output position reads. In a transposed
convolution the two change places: the patches are cut from the output's gradient.

Index legend: `n` sample, `b` further batch dimension within a sample, `g` group, `p` position,
`o`/`c` output/input channel of the group, `k` place in the kernel.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ewc.fisher.gradients import Gradient, Outer, Total, work_elements
from ewc.fisher.rules._registry import Operation, rule


class Patches(Gradient):
    """`grad[n, g, o, (c, k)] = sum_bp out[n, b, g, o, p] * patch[n, b, g, (c, k), p]`.

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
        self._per_row = out.shape[1] * math.prod(self._places[1:]) * math.prod(shape[1:]) * groups

    @override
    def work(self, total: Tensor) -> int:
        return max(total.numel(), self._per_row * min(self._places[0], self._rows(total)))

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        # An image too large to write out all its patches is done some rows at a time.
        rows = self._rows(self.out)
        read, out = _pad(self.read[start:stop], self.margins), self.out[start:stop]
        product = self._product(read, out, 0, rows)
        for top in range(rows, self._places[0], rows):
            product += self._product(read, out, top, top + rows)
        return product

    @override
    def add_squares(self, total: Tensor) -> None:
        fits = self._rows(total) >= self._places[0]
        if self.groups > 1 or not fits:
            super().add_squares(total)
        elif self.shape[1] * self.shape[-1] < self._places[-1]:
            self._add_squares_channels_first(total)
        else:
            self._add_squares_channels_last(total)

    def _add_squares_channels_first(self, total: Tensor) -> None:
        """Patches `[n, (c, k), (b, p)]`, copied in runs along the last dimension of positions."""
        squares = total.new_zeros(math.prod(self.shape[1:]), self.shape[0])
        scratch: Tensor | None = None
        for read, out in self._chunks(total, channels_last=False):
            patches = self._patches(read, 0, self._places[0])
            scratch = patches.new_empty(patches.shape) if scratch is None else scratch
            left = scratch[: len(read)].copy_(patches).view(len(read), len(squares), -1)
            Outer(left.mT, out).add_squares(squares)
        total.add_(squares.t().view(self.shape))

    def _add_squares_channels_last(self, total: Tensor) -> None:
        """Patches `[n, (b, p), (k, c)]`, copied in runs along the kernel and the channels."""
        squares = total.new_zeros(self.shape[0], math.prod(self.shape[1:]))
        scratch: Tensor | None = None
        for read, out in self._chunks(total, channels_last=True):
            lead, space, channel = read.stride()[:2], read.stride()[2:-1], read.stride()[-1]
            patches = read.as_strided(
                (*read.shape[:2], *self._places, *self.shape[2:], self.shape[1]),
                (*lead, *_times(space, self.stride), *_times(space, self.dilation), channel),
                read.storage_offset(),
            )
            scratch = patches.new_empty(patches.shape) if scratch is None else scratch
            right = scratch[: len(read)].copy_(patches).view(len(read), -1, squares.shape[1])
            Outer(out, right).add_squares(squares)
        total.add_(squares.view(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1))

    def _chunks(self, total: Tensor, *, channels_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Some samples at a time: padded images, `[n, b, (c,) *space, (c)]`, and `[n, (b, p), o]`.

        So many are padded at once that they fit the work space, and so many handed over that
        their patches stay in the cache.
        """
        image = max(1, self.read[0].numel())
        patches = max(1, self._per_row * self._places[0])
        block = max(1, 8 * work_elements(total) // image)
        step = max(1, 2 * work_elements(total) // patches)
        for first in range(0, self.samples, block):
            read, out = self.read[first : first + block], self.out[first : first + block]
            if channels_last:
                read = _pad(read.movedim(2, -1), [0, 0, *self.margins]).contiguous()
            else:
                read = _pad(read, self.margins)
            out = out.flatten(3).transpose(2, 3).flatten(1, 2)
            yield from zip(read.split(step), out.split(step), strict=True)

    def _rows(self, tensor: Tensor) -> int:
        """How many rows of positions may be written out at a time for one sample."""
        return max(1, 8 * work_elements(tensor) // max(1, self._per_row))

    def _patches(self, read: Tensor, top: int, bottom: int) -> Tensor:
        """A view `[n, c, *k, b, *places]` of the rows `top` to `bottom - 1` of the positions."""
        read = read[:, :, :, top * self.stride[0] :]
        n, b, channels = read.shape[:3]
        lead, space = read.stride()[:3], read.stride()[3:]
        rows = min(bottom, self._places[0]) - top
        return read.as_strided(
            (n, channels, *self.shape[2:], b, rows, *self._places[1:]),
            (
                *(lead[0], lead[2], *_times(space, self.dilation)),
                *(lead[1], *_times(space, self.stride)),
            ),
            read.storage_offset(),
        )

    def _product(self, read: Tensor, out: Tensor, top: int, bottom: int) -> Tensor:
        """The gradients that some rows of the positions give, `[n, *shape]`."""
        n, group = len(read), self.shape[0] // self.groups
        patches = self._patches(read, top, bottom)
        patches = patches.reshape(n, self.groups, math.prod(self.shape[1:]), -1)
        out = out[:, :, :, top:bottom].transpose(1, 2)
        return (out.reshape(n, self.groups, group, -1) @ patches.mT).reshape(n, *self.shape)


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

        return op.watch(out, {weight: weight_gradient, bias: lambda g: _bias(g, dims)})

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

        return op.watch(out, {weight: weight_gradient, bias: lambda g: _bias(g, dims)})


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
