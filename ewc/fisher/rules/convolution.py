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

from ewc.fisher.gradients import Gradient, Total
from ewc.fisher.rules._registry import Operation, rule


class Patches(Gradient):
    """`grad[n, g, o, (c, k)] = sum_bp out[n, b, g, o, p] * patch[n, b, g, (c, k), p]`.

    Args:
        read: `[N, B, C, *space]`, padded: what the patches are cut from.
        out: `[N, B, O, *places]`: what the patch of each position is multiplied with.
        shape: The weight's shape, `[O, C / groups, *kernel]`.
        stride: The step between patches, in each dimension.
        dilation: The step within a patch, in each dimension.
        groups: How many groups the channels fall into.
    """

    def __init__(
        self,
        read: Tensor,
        out: Tensor,
        shape: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.read, self.out, self.shape = read, out, tuple(shape)
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.samples = read.shape[0]

    @override
    def work(self, total: Tensor) -> int:
        places = math.prod(self.out.shape[3:]) * self.out.shape[1]
        return max(total.numel(), math.prod(self.shape[1:]) * self.groups * places)

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        patches = self._patches(start, stop)
        out = torch.unflatten(self.out[start:stop].flatten(3), 2, (self.groups, -1))
        product = out @ patches.mT
        return product.sum(1).reshape(-1, *self.shape)

    def _patches(self, start: int, stop: int) -> Tensor:
        """`[n, b, g, (c, k), p]`: copied, since a view with repeated elements has no product."""
        read = self.read[start:stop]
        lead, space = read.stride()[:3], read.stride()[3:]
        view = read.as_strided(
            (*read.shape[:3], *self.shape[2:], *self.out.shape[3:]),
            (
                *lead,
                *(step * each for step, each in zip(space, self.dilation, strict=True)),
                *(step * each for step, each in zip(space, self.stride, strict=True)),
            ),
            read.storage_offset(),
        )
        rows = math.prod(self.shape[1:])
        return view.reshape(*read.shape[:2], self.groups, rows, math.prod(self.out.shape[3:]))


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
            read = _pad(_images(x, dims), margins)
            return Patches(read, _images(g, dims), value.shape, steps, gaps, groups)

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
            read = _pad(_images(g, dims), margins)
            return Patches(read, _images(x, dims), value.shape, steps, gaps, groups)

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
